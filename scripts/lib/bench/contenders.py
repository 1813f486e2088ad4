"""The measured tools. Each makes one cold pull from the same registry onto a fresh tmpfs.

A contender is prepared (its daemon started, its directories created), then timed while it turns the image into
a tree of files, then asked for the path of that tree. Additional work counts: guestpulld mounts a root
filesystem and writes a runtime config, podman and containerd register the image; umoci only unpacks it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from bench.daemon import serving
from bench.layers import CODECS, Codec
from bench.place import Cgroup, Refusal, run
from guestpull_server import __version__

_PATIENCE: Final = 20.0  # seconds until containerd must answer


@dataclass(frozen=True, slots=True)
class Ready:
    """A prepared contender: `pull` is timed; `rootfs` makes the tree accessible and returns its path."""

    pull: Callable[[], None]
    rootfs: Callable[[], Path]


MakeReady: TypeAlias = Callable[[Path, Cgroup, str], AbstractContextManager[Ready]]
"""Called with an empty directory, the cgroup for its processes, and the reference to pull."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A measured tool. `directory_times`: whether it restores the times of directories."""

    name: str
    version: str
    make_ready: MakeReady
    codecs: tuple[Codec, ...] = CODECS
    directory_times: bool = True


def contenders() -> list[Contender]:
    """All contenders, guestpulld first."""
    return [
        Contender("guestpulld", __version__, guestpulld),
        Contender("podman", run("podman", "--version").split()[-1], podman),
        Contender("containerd", run("containerd", "--version").split()[2].partition("~")[0], containerd),
        Contender(
            "skopeo+umoci",
            f"{run('skopeo', '--version').split()[2]}, {run('umoci', '--version').split()[2].partition('+')[0]}",
            skopeo_umoci,
            codecs=("gzip", "plain"),  # Debian's umoci does not support zstd
        ),
    ]


@contextmanager
def guestpulld(directory: Path, cgroup: Cgroup, reference: str) -> Iterator[Ready]:
    """guestpulld, called through its Python client."""
    with serving(directory, cgroup) as daemon:
        bundle = daemon.new_bundle()

        def pull() -> None:
            daemon.client.pull(reference, bundle)

        yield Ready(pull, lambda: Path(bundle) / "rootfs")
        daemon.client.release_bundle(bundle)


@contextmanager
def podman(directory: Path, cgroup: Cgroup, reference: str) -> Iterator[Ready]:
    """`podman pull` as root, with the overlay driver."""
    (directory / "tmp").mkdir()
    command = ["env", f"TMPDIR={directory}/tmp", "podman", "--root", f"{directory}/root"]
    command += ["--runroot", f"{directory}/run", "--storage-driver", "overlay"]
    # let podman initialise its storage before it is timed
    run(*command, "images")

    def pull() -> None:
        run(*cgroup.command([*command, "pull", "--quiet", "--tls-verify=false", reference]))

    yield Ready(pull, lambda: Path(run(*command, "image", "mount", reference).strip()))


@contextmanager
def containerd(directory: Path, cgroup: Cgroup, reference: str) -> Iterator[Ready]:
    """`ctr images pull` with our own containerd and the overlayfs snapshotter."""
    socket_path = directory / "containerd.sock"
    configuration = directory / "config.toml"
    configuration.write_text(
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\n  address = "{socket_path}"\n'
    )
    command = ["ctr", "--address", str(socket_path)]
    with (directory / "log").open("wb") as log:
        daemon = cgroup.command(["containerd", "--config", configuration])
        process = subprocess.Popen(daemon, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + _PATIENCE
        while subprocess.run([*command, "version"], capture_output=True, check=False).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise Refusal(f"containerd does not start: {(directory / 'log').read_text()}")
            time.sleep(0.1)

        def pull() -> None:
            run(*cgroup.command([*command, "images", "pull", "--plain-http", reference]))

        def rootfs() -> Path:
            mounted = directory / "mounted"
            mounted.mkdir()
            run(*command, "images", "mount", reference, mounted)
            return mounted

        yield Ready(pull, rootfs)
    finally:
        process.terminate()
        process.wait(_PATIENCE)


@contextmanager
def skopeo_umoci(directory: Path, cgroup: Cgroup, reference: str) -> Iterator[Ready]:
    """`skopeo copy` to a layout, and `umoci raw unpack` of it."""
    layout = f"{directory}/layout"

    def pull() -> None:
        source, target = f"docker://{reference}", f"oci:{layout}:it"
        run(*cgroup.command(["skopeo", "copy", "--quiet", "--src-tls-verify=false", source, target]))
        run(*cgroup.command(["umoci", "raw", "unpack", "--image", f"{layout}:it", f"{directory}/rootfs"]))

    yield Ready(pull, lambda: directory / "rootfs")
