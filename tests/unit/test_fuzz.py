"""The fuzzing targets: they stand their own corpora, a first few damaged inputs, and find what is planted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from fuzz import mutation
from fuzz.campaign import Campaign
from fuzz.targets import TARGETS, Target

_WITHOUT_ROOT = [target for target in TARGETS if not target.needs_root]


@pytest.mark.parametrize("target", _WITHOUT_ROOT, ids=lambda target: target.name)
def test_a_target_stands_its_corpus_and_some_damage(target: Target) -> None:
    corpus = target.corpus()
    for one in corpus:
        target.run(one)
    for number in range(100):
        target.run(target.mutate(random.Random(number), corpus))


def test_the_same_number_is_the_same_input() -> None:
    target = _WITHOUT_ROOT[0]
    first, second = (target.mutate(random.Random("1/tar/7"), target.corpus()) for _ in range(2))
    assert first == second


def test_a_failure_is_kept_with_the_input_that_reproduces_it(tmp_path: Path) -> None:
    def run(content: bytes) -> None:
        assert b"b" in content, "planted"

    def corpus() -> Sequence[bytes]:
        return (b"b",)

    campaign = Campaign(seed=1, directory=tmp_path)
    campaign.try_input(Target("planted", corpus, mutation.bytes_of, run), b"abc", 0)
    campaign.try_input(Target("planted", corpus, mutation.bytes_of, run), b"xyz", 1)
    (failure,) = campaign.failures
    assert (failure.number, failure.reproducer.read_bytes()) == (1, b"xyz")
    assert "planted" in failure.trace
