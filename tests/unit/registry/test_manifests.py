"""Manifests, indexes and configs, whatever a registry may send for them."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from guestpull_server.errors import (
    InvalidManifest,
    LimitExceeded,
    NoMatchingPlatform,
    UnsupportedImage,
)
from guestpull_server.models import Descriptor, Digest
from guestpull_server.platforms import Platform
from guestpull_server.registry.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Document,
    ImageIndex,
    ImageManifest,
    IndexEntry,
    candidates,
    check_platform,
    pair_layers,
    read,
    read_config,
)
from support.images import file, image, index, layer

SHOP = image(layer(file("a")), layer(file("b"), compression="zstd"))
LISTED = index(SHOP, image(layer(file("c")), platform="linux/arm/v7"))
NAMED = (InvalidManifest, LimitExceeded, UnsupportedImage)
"""What reading a manifest may raise, and nothing else."""

content_types = st.sampled_from([OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST, "text/plain", ""])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)


@st.composite
def spoiled(draw: st.DrawFn, whole: bytes) -> bytes:
    """A document in which some values, wherever they are, are replaced, or gone."""
    spoilt: Any = copy.deepcopy(json.loads(whole))
    for _ in range(draw(st.integers(1, 3))):
        at = spoilt
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and draw(st.booleans()):
                at = at[key]
                continue
            if draw(st.booleans()):
                at[key] = draw(values)
            else:
                del at[key]
            break
    return json.dumps(spoilt).encode()


def read_it(content: bytes, content_type: str = "") -> ImageManifest | ImageIndex:
    return read(Document("shop", Digest.of(content), content, content_type), max_layers=5)


@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()), content_types)
def test_any_bytes_are_a_manifest_or_refused_by_name(content: bytes, content_type: str) -> None:
    with contextlib.suppress(*NAMED):
        read_it(content, content_type)


@given(spoiled(SHOP.manifest), content_types)
def test_a_spoiled_manifest_is_read_or_refused_by_name(content: bytes, content_type: str) -> None:
    try:
        found = read_it(content, content_type)
    except NAMED:
        return
    assert isinstance(found, ImageManifest)
    assert all(one.size >= 0 for one in (found.config, *found.layers))


@given(spoiled(LISTED.manifest), content_types)
def test_a_spoiled_index_is_read_or_refused_by_name(content: bytes, content_type: str) -> None:
    try:
        found = read_it(content, content_type)
    except NAMED:
        return
    assert isinstance(found, ImageIndex)
    assert all(entry.descriptor.size >= 0 for entry in found.entries)


@given(st.binary(max_size=200) | spoiled(SHOP.config))
def test_any_config_is_paired_with_its_layers_or_refused_by_name(content: bytes) -> None:
    manifest = read_it(SHOP.manifest)
    assert isinstance(manifest, ImageManifest)
    try:
        config = read_config("shop", Digest.of(content), content)
        layers = pair_layers("shop", Digest(SHOP.digest), manifest, config)
        check_platform("shop", config.platform, Platform("linux", "amd64"))
    except (InvalidManifest, UnsupportedImage, NoMatchingPlatform):
        return
    assert [one.blob for one in layers] == list(manifest.layers)


architectures = st.sampled_from(["amd64", "386", "arm64", "arm", "riscv64"])
platforms = st.builds(
    Platform,
    st.sampled_from(["linux", "windows", "unknown"]),
    architectures,
    st.sampled_from(["", "v1", "v2", "v5", "v6", "v7", "v8", "v9", "v8.1", "power9", "v" * 50]),
)
ALSO_RUNS: Mapping[str, str] = {"amd64": "386", "arm64": "arm"}


@given(st.lists(st.none() | platforms, max_size=8), platforms)
def test_what_is_chosen_of_an_index_runs(listed: list[Platform | None], wanted: Platform) -> None:
    entries = [
        IndexEntry(Descriptor(OCI_MANIFEST, Digest.of(bytes([number])), 1), platform)
        for number, platform in enumerate(listed)
    ]
    by_digest = {entry.descriptor.digest: entry.platform for entry in entries}
    try:
        chosen = [by_digest[one.digest] for one in candidates("shop", ImageIndex(tuple(entries)), wanted)]
    except NoMatchingPlatform:
        assert wanted not in listed
        assert None not in listed
        return
    if wanted in listed:
        assert len(chosen) == 1
    for platform in chosen:
        if platform is not None:
            assert platform.os == wanted.os
            assert platform.architecture in (wanted.architecture, ALSO_RUNS.get(wanted.architecture))
