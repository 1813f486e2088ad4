"""Images of `support.images` in files: OCI layouts, and archives of docker save and skopeo.

    write_layout(tmp_path, {"1.0": shop})                        # for oci:
    (tmp_path / "shop.tar").write_bytes(archived(layout_of({"1.0": shop})))     # for oci-archive:
    (tmp_path / "shop.tar").write_bytes(archived(docker_save({"shop:1.0": shop})))    # for docker-archive:

A layout or archive is first a mapping of paths to contents, which a test may alter.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from support.images import Image, Index, Json, Layer, descriptor, index_entry, sha256

Tree: TypeAlias = dict[str, bytes]

REF_NAME = "org.opencontainers.image.ref.name"


def blob_path(digest: str) -> str:
    """The path of a blob in a layout."""
    return "blobs/" + digest.replace(":", "/")


def layout_of(tagged: Mapping[str, Image | Index], *, entries: Iterable[Json] | None = None) -> Tree:
    """An OCI layout of images by tag; an empty tag means no tag. `entries` replaces those of index.json."""
    tree: Tree = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
    described: list[Json] = []
    for tag, pushed in tagged.items():
        for digest, blob in pushed.blobs.items():
            tree[blob_path(digest)] = blob
        for _, manifest in pushed.manifests:
            tree[blob_path(sha256(manifest))] = manifest
        annotations: dict[str, Json] = {"annotations": {REF_NAME: tag}} if tag else {}
        described.append(descriptor(pushed.manifest, pushed.media_type, **annotations))
    chosen = described if entries is None else list(entries)
    tree["index.json"] = json.dumps({"schemaVersion": 2, "manifests": chosen}).encode()
    return tree


def entry_named(pushed: Image | Index, **annotations: str) -> dict[str, Json]:
    """An entry of index.json, with its platform and annotations."""
    return index_entry(pushed, annotations=annotations)


def docker_save(named: Mapping[str, Image], *, compressed: bool = False) -> Tree:
    """The output of docker save for images by name; a name that begins with `-` means no name.

    Args:
        named: the images.
        compressed: keep the layers compressed, under their digests, as Docker's containerd image store does.
    """
    tree: Tree = {}
    listed: list[Json] = []
    for name, saved in named.items():
        config = blob_path(saved.image_id) if compressed else f"{saved.image_id.removeprefix('sha256:')}.json"
        tree[config] = saved.config
        paths = [_layer_path(one, compressed) for one in saved.layers]
        tree |= {
            path: one.blob if compressed else one.tar for path, one in zip(paths, saved.layers, strict=True)
        }
        tags: list[Json] = [] if name.startswith("-") else [name]
        listed.append({"Config": config, "RepoTags": tags, "Layers": paths})
    tree["manifest.json"] = json.dumps(listed).encode()
    return tree


def _layer_path(one: Layer, compressed: bool) -> str:
    return blob_path(one.digest) if compressed else f"{one.diff_id.removeprefix('sha256:')}/layer.tar"


def archived(tree: Mapping[str, bytes], *, links: Mapping[str, str] | None = None, prefix: str = "") -> bytes:
    """A tar of a tree; `links` are symbolic links in it, `prefix` is prepended to each name."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for path, content in tree.items():
            header = tarfile.TarInfo(prefix + path)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        for path, target in (links or {}).items():
            header = tarfile.TarInfo(prefix + path)
            header.type, header.linkname = tarfile.SYMTYPE, target
            tar.addfile(header)
    return output.getvalue()


def write_tree(directory: Path, tree: Mapping[str, bytes]) -> Path:
    """Write a tree to a directory."""
    for path, content in tree.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return directory


def write_layout(directory: Path, tagged: Mapping[str, Image | Index]) -> Path:
    """Write an OCI layout to a directory."""
    return write_tree(directory, layout_of(tagged))
