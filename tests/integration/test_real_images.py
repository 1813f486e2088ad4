"""Images made of what this machine has, by the tools that others use, and compared with what others unpack."""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpull_client.errors import Unauthenticated
from support.daemon import Daemon
from support.images import Layer, directory, file, image, layer, layer_of_tar, opaque, whiteout
from support.peers import DockerRegistry, run, skopeo_copy, unpacked_by_umoci
from support.samples import runnable
from support.trees import differences, tree

HOST_PATHS = ("/usr/bin", "/usr/share/doc", "/usr/share/perl", "/usr/share/zoneinfo", "/usr/lib")
ENTRIES = 4000
LARGEST = 1_000_000  # bytes of a file


def host_paths() -> Iterator[str]:
    """Paths of this machine, parents first; a share of each of HOST_PATHS."""
    yield from ("usr", "usr/share")
    for top in filter(os.path.isdir, HOST_PATHS):
        below = itertools.chain([top], _below(top))
        yield from (path.lstrip("/") for path in itertools.islice(below, ENTRIES // len(HOST_PATHS)))


def _below(top: str) -> Iterator[str]:
    for parent, directories, files in os.walk(top):
        directories.sort()
        for name in sorted((*directories, *files)):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode) or status.st_size <= LARGEST:
                yield path


def host_layer(tmp_path: Path, tar_format: str) -> Layer:
    """Some thousand files of this machine, as GNU tar packs them."""
    paths = dict.fromkeys(host_paths())
    # a directory before what is in it: umoci gives a directory that it had to make a time of its own
    listed = "".join(f"{path}\0" for path in sorted(paths))
    archive = tmp_path / "host.tar"
    command = ["tar", "--create", f"--file={archive}", f"--format={tar_format}", "--directory=/", "--null"]
    xattrs = ["--xattrs", "--xattrs-include=security.capability"] if tar_format == "posix" else []
    packed = run(
        *command, *xattrs, "--no-recursion", "--files-from=-", stdin=os.fsencode(listed), check=False
    )
    assert packed.returncode in (0, 1), (
        packed.stderr
    )  # 1: what was packed changed meanwhile; it is a tar all the same
    return layer_of_tar(archive.read_bytes())


@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_thousands_of_this_machine_s_files_are_what_umoci_unpacks(
    daemon: Daemon, docker_registry: DockerRegistry, tmp_path: Path, tar_format: str
) -> None:
    base = host_layer(tmp_path, tar_format)
    top = layer(
        directory("usr"),
        directory("usr/share"),
        directory("usr/share/zoneinfo", mode=0o711),
        opaque("usr/share/zoneinfo"),
        file("usr/share/zoneinfo/only", b"this"),
        whiteout("usr/share/perl"),
    )
    reference = docker_registry.push(f"host-{tar_format}", "1", image(base, top))

    pulled = daemon.client.pull(reference, str(daemon.bundle("one")))

    theirs = tree(unpacked_by_umoci(reference, tmp_path / "umoci"))
    # no tar says when the root was changed: umoci says now, we say 1970
    found = differences(tree(pulled.rootfs_path), theirs)
    assert [one for one in found if not one.startswith("/: mtime_ns")] == []
    assert len(theirs) > 500


def test_a_registry_with_passwords_gives_its_images_to_those_who_have_one(
    daemon: Daemon, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    content = runnable()
    public = docker_registry.push("public", "1", image(content))
    wonderland = "$2b$04$Y7FIp5EwYEDHlWq.4Bq4ZujEyweJGbXa9iuymoF53UZRDdOCllFru"
    with DockerRegistry(tmp_path / "private", users={"alice": wonderland}) as registry:
        private = f"{registry.host}/private:1"
        skopeo_copy(f"docker://{public}", f"docker://{private}", "--dest-creds=alice:wonderland")

        with pytest.raises(Unauthenticated):
            daemon.client.pull(private, str(daemon.bundle("one")))
        pulled = daemon.client.pull(private, str(daemon.bundle("one")), auth="alice:wonderland")

    assert (Path(pulled.rootfs_path) / "etc/passwd").exists()
