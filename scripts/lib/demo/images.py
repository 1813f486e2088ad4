"""The images of the demonstration: real images from Debian's packages, created once and kept.

    debian:12     debootstrap's minbase: dpkg, apt and their dependencies
    python:3.11   the same layer, and one with Python and some of its packages, installed by apt
    shop:1.0      the same two layers, and one with an application

They are built like images of image builders: mmdebstrap fills the first layer, apt the second, and umoci packs the
changes of each step. `guest` is the root filesystem of a guest without containers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from demo.stage import run, tmpfs

_FORM: Final = "1"  # version of the images; change it to create all of them again
_SUITE: Final = "bookworm"
_MIRROR: Final = "http://deb.debian.org/debian"
_PYTHON_PACKAGES: Final = ("python3", "python3-requests", "python3-numpy")
_GUEST_PACKAGES: Final = ("python3", "runc", "iproute2")
_SHOP: Final = '''\
"""A shop that sells numbers."""
import os, platform, pwd
import numpy

print(f"shop: Python {platform.python_version()}, numpy {numpy.__version__}, host {platform.node()}")
print(f"shop: I am {pwd.getpwuid(os.getuid()).pw_name} in {os.getcwd()}; 6 x 7 = {numpy.dot([6], [7])}")
'''
TAGS: Final = ("debian", "python", "shop")


def make_images(kept: Path, say: Callable[[str], None]) -> Path:
    """Create the images unless they exist; return the OCI layout that holds them, with the tags of `TAGS`."""
    layout = kept / f"images-{_FORM}"
    if layout.exists():
        return layout
    making = kept / "making"
    shutil.rmtree(making, ignore_errors=True)
    with tmpfs() as scratch:
        bundle = scratch / "bundle"
        rootfs = bundle / "rootfs"
        run("umoci", "init", "--layout", making)
        run("umoci", "new", "--image", f"{making}:debian")
        run("umoci", "unpack", "--image", f"{making}:debian", bundle)
        say(f"bootstrapping Debian {_SUITE} with mmdebstrap (once; it is kept)")
        _bootstrap(rootfs, "directory", ())
        _pack(making, "debian", bundle, "--config.cmd", "bash")
        say(f"installing {' '.join(_PYTHON_PACKAGES)} with apt, as the next layer (once)")
        _install(rootfs, _PYTHON_PACKAGES)
        _pack(making, "python", bundle, "--config.cmd", "python3")
        _write_shop(rootfs)
        shop = ["--config.entrypoint", "python3", "--config.cmd", "shop.py"]
        shop += ["--config.workingdir", "/srv/shop", "--config.user", "shop"]
        _pack(making, "shop", bundle, *shop)
    making.rename(layout)
    return layout


def make_guest(kept: Path, say: Callable[[str], None]) -> Path:
    """Create a guest's root filesystem unless it exists; return the path of its tar."""
    archive = kept / f"guest-{_FORM}.tar"
    if not archive.exists():
        say(f"bootstrapping a guest with {', '.join(_GUEST_PACKAGES)} by mmdebstrap (once; it is kept)")
        making = kept / "guest-making.tar"
        _bootstrap(making, "tar", _GUEST_PACKAGES)
        making.rename(archive)
    return archive


def _bootstrap(target: Path, form: str, packages: tuple[str, ...]) -> None:
    include = [f"--include={','.join(packages)}"] if packages else []
    run(
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        f"--format={form}",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        *include,
        _SUITE,
        target,
        _MIRROR,
    )


def _install(rootfs: Path, packages: tuple[str, ...]) -> None:
    """Install packages like a RUN of a Dockerfile, and delete package lists and archives."""
    resolver = rootfs / "etc/resolv.conf"
    before = resolver.read_bytes() if resolver.exists() else None
    shutil.copyfile("/etc/resolv.conf", resolver)
    script = (
        "apt-get update -qq && apt-get install -qq --yes --no-install-recommends "
        f"{' '.join(packages)} && apt-get clean && rm -rf /var/lib/apt/lists/*"
    )
    variables = {"DEBIAN_FRONTEND": "noninteractive", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    run("chroot", rootfs, "sh", "-c", script, variables=variables)
    if before is None:
        resolver.unlink()
    else:
        resolver.write_bytes(before)


def _write_shop(rootfs: Path) -> None:
    run("chroot", rootfs, "useradd", "--system", "--home-dir", "/srv/shop", "--create-home", "shop")
    (rootfs / "srv/shop/shop.py").write_text(_SHOP)


def _pack(layout: Path, tag: str, bundle: Path, *config: str) -> None:
    """Create a layer of the changes since the last one, and an image with it on top."""
    run("umoci", "repack", "--refresh-bundle", "--image", f"{layout}:{tag}", bundle)
    run("umoci", "config", "--image", f"{layout}:{tag}", *config)
    # the next layer is packed on top of this image
