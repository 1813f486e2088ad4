"""A process that is killed at any of its system calls leaves a store that is true, and goes on from there.

A child process tells the story, and kills itself at its n-th call that changes something on disk; a write is cut
in the middle. Then what it left is looked at from outside, opened, and the story is told to its end.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from guestpull_server.models import Digest
from guestpull_server.store import durability
from guestpull_server.store.durability import Durability
from support.store_story import (
    BASE,
    check_end,
    check_from_outside,
    check_store,
    tell_the_story,
)
from support.stores import MountsInMemory, is_whole, open_store

CHANGES: Final = ("rename", "mkdir", "rmdir", "unlink", "write", "fsync", "open", "ftruncate")


def run_and_die(number: int, work_dir: Path, bundles: Path) -> bool:
    """Tell the story in a child process that dies at its n-th change; returns whether it came that far."""
    child = os.fork()
    if child == 0:
        try:
            die_at(number)
            mounts = MountsInMemory()
            store = open_store(work_dir, mounts)
            tell_the_story(store, mounts, bundles)
            store.close()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def die_at(number: int) -> None:
    """Have this process kill itself at its n-th change; syncs count, and wait for nothing."""
    left = number
    patching = pytest.MonkeyPatch()  # never undone: the process ends
    patching.setattr(durability, "is_volatile", lambda _path: False)
    patching.setattr(Durability, "sync_tree", lambda _self, _directory: None)
    patching.setattr(os, "fsync", lambda _descriptor: None)

    def dying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if name != "open" or arguments[1] & os.O_CREAT:
                left -= 1
                if left == 0:
                    if name == "write":
                        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return counted

    for name in CHANGES:
        call: Callable[..., Any] = getattr(os, name)
        setattr(os, name, dying(name, call))


@pytest.mark.parametrize("part", range(4))
def test_killed_at_any_system_call_the_store_is_true_and_goes_on(tmp_path: Path, part: int) -> None:
    number, survived = part + 1, 0
    while True:
        work_dir, bundles = tmp_path / f"{number}/work", tmp_path / f"{number}/bundles"
        bundles.mkdir(parents=True)
        if not run_and_die(number, work_dir, bundles):
            break
        survived += 1
        mounts = MountsInMemory()
        mounts.places = {str(path) for path in bundles.glob("*/rootfs")}
        check_from_outside(work_dir)
        store = open_store(work_dir, mounts)
        check_store(store, work_dir, mounts)
        tell_the_story(store, mounts, bundles)
        check_store(store, work_dir, mounts)
        check_end(store, work_dir, bundles)
        number += 4
    assert survived > 20  # the story is long enough to be worth it


def test_killed_again_and_again_the_store_is_true_and_goes_on(tmp_path: Path) -> None:
    work_dir, bundles = tmp_path / "work", tmp_path / "bundles"
    bundles.mkdir()
    for number in (3, 5, 8, 13, 21, 34, 55, 1, 2, 4, 7, 11):
        run_and_die(number, work_dir, bundles)
        check_from_outside(work_dir)
    mounts = MountsInMemory()

    store = open_store(work_dir, mounts)

    check_store(store, work_dir, mounts)
    tell_the_story(store, mounts, bundles)
    check_end(store, work_dir, bundles)


def test_a_layer_is_whole_or_absent_whatever_the_others_do(work_dir: Path) -> None:
    """The half-unpacked layer of another program, under a name that a commit is about to take."""
    number = 1
    half = work_dir / "layers" / Digest(BASE.digest).directory_name
    while True:
        half.mkdir(parents=True, exist_ok=True)
        (half / "one").write_bytes(BASE.tar[:10])
        died = run_and_die(number, work_dir, work_dir.parent / "bundles")
        store = open_store(work_dir)
        found = store.layer(Digest(BASE.digest))
        assert found is None or is_whole(found.store_path, BASE)
        store.close()
        if not died:
            return
        number += 3
        shutil.rmtree(work_dir)
