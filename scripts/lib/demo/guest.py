"""Demonstrates a guest image with baked containers, which start without a download.

The guest is a Debian with Python, runc and guestpull, as an EROFS image. It boots without a hypervisor: in new
mount, process, network and host-name namespaces, with the read-only image and a tmpfs on top as its root, and
without access to the host's files. Only a kernel of its own is missing.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
import tomllib
from hashlib import sha256
from pathlib import Path
from typing import Final

from demo.images import make_guest
from demo.stage import DemoFailed, Stage, run
from demo.story import start_registry

_ROOT: Final = Path(__file__).parents[3]
_STORE: Final = "/var/lib/guestpull/store"  # of the guest
_PACKAGES: Final = ("protos/guestpull_protos", "server/guestpull_server", "client/guestpull_client")
_PROGRAMS: Final = {
    "guestpulld": "guestpull_server.cli",
    "guestpull": "guestpull_client.cli",
    "guestpull-agent": "guestpull_client.agent.cli",
}
_GUEST_PYTHON: Final = "3.11"  # of Debian 12

_BOOT: Final = """\
#!/bin/sh
# A guest's early boot: mount the read-only image with a tmpfs on top, and leave the host's root.
set -e
mkdir -p lower upper root
mount -t erofs -o ro,loop guest.erofs lower
mount -t tmpfs tmpfs upper
mkdir upper/upper upper/work
mount -t overlay -o lowerdir=lower,upperdir=upper/upper,workdir=upper/work overlay root
# mount the baked layers from the image itself: the overlay above would hide their whiteouts
mount --bind lower{store} root{store}
mount -t proc proc root/proc
mount --rbind /sys root/sys
mount --rbind /dev root/dev
mount -t tmpfs tmpfs root/run
cd root
pivot_root . mnt
umount --lazy /mnt
hostname guest
exec env --ignore-environment PATH=/usr/sbin:/usr/bin:/sbin:/bin /sbin/init "$@"
"""
_INIT: Final = """\
#!/bin/sh
# The guest's first process: starts guestpulld, then runs the stand-in for Kata's agent with one container.
config=$1; shift
guestpulld serve --work-dir /run/kata-containers/image --config "$config" &
while [ ! -S /run/guestpull/guestpull.sock ]; do sleep 0.01; done
exec guestpull-agent run --time --policy missing "$@"
"""


def tell(stage: Stage, layout: Path, kept: Path) -> None:
    """Run the demonstration.

    Raises:
        DemoFailed: a step failed.
    """
    archive = make_guest(kept, _say)
    libraries = _libraries(kept)
    host = start_registry(stage, layout)
    image = f"{host}/shop:1.0"
    _build(stage, archive, libraries)
    _bake(stage, layout, image)
    _boot(stage, image)


def _build(stage: Stage, archive: Path, libraries: Path) -> None:
    stage.chapter("A guest's root filesystem")
    stage.tell(
        "Debian 12 with Python and runc (mmdebstrap), and guestpull with the libraries that it needs (pip)."
    )
    stage.show(f"mkdir guest && tar --extract --file {archive} --directory guest")
    packages = " ".join(str(_ROOT / package) for package in _PACKAGES)
    stage.show(
        f"cp --recursive {libraries} guest/opt/guestpull && cp --recursive {packages} guest/opt/guestpull/"
    )
    guest = stage.directory / "guest"
    for name, module in _PROGRAMS.items():
        program = f'#!/bin/sh\nPYTHONPATH=/opt/guestpull exec python3 -P -m {module} "$@"\n'
        _write(guest / "usr/bin" / name, program, 0o755)
    (guest / "sbin/init").unlink(missing_ok=True)
    _write(guest / "sbin/init", _INIT, 0o755)
    _write(guest / "etc/guestpull.json", f'{{"additional_stores": ["{_STORE}"]}}\n', 0o644)
    _write(guest / "etc/guestpull-unbaked.json", "{}\n", 0o644)
    stage.show("chroot guest python3 -m compileall -q /opt/guestpull")
    stage.show("tail -n +2 guest/sbin/init && cat guest/etc/guestpull.json")
    stage.tell(
        "What the guest does when it boots, and its configuration: one read-only store, beside the work directory."
    )


def _bake(stage: Stage, layout: Path, image: str) -> None:
    stage.chapter("Baking")
    where = f"--work-dir guest{_STORE} --guest-work-dir {_STORE}"
    stage.show(f"guestpulld bake {where} oci:{layout}:shop --reference {image}")
    stage.tell(
        "No daemon, and no network: the image came from a directory, and will be asked for by its registry's "
        "name. meta_store.json says where the layers are as the guest will see them:"
    )
    stage.show(f'grep --only-matching \'"store_path":"[^"]*\' guest{_STORE}/meta_store.json | sort --unique')
    stage.show(f"guestpulld verify {where}")
    stage.show("mkfs.erofs -d1 -zlz4 --quiet guest.erofs guest 2>&1 && ls -l --human-readable guest.erofs")
    stage.tell("The guest image, its containers in it: read-only, measurable, the same for every guest.")


def _boot(stage: Stage, image: str) -> None:
    boot = stage.directory / "boot"
    _write(boot, _BOOT.format(store=_STORE), 0o755)
    namespaces = "unshare --mount --propagation private --pid --fork --kill-child --uts --ipc"
    stage.chapter("Booting it as if nothing had been baked, with the registry there")
    stage.show("cat boot")
    stage.tell(
        "A guest without a hypervisor: it shares the kernel, but has its own root, processes and "
        "names. This one may use the host's network, and its configuration names no baked store:"
    )
    cold = _milliseconds(stage.show(f"{namespaces} ./boot /etc/guestpull-unbaked.json {image}"))
    stage.chapter("Booting it with what was baked, and no network at all")
    stage.end("registry")
    baked = _milliseconds(stage.show(f"{namespaces} --net ./boot /etc/guestpull.json {image}"))
    stage.chapter("That was it")
    stage.tell(
        f"From the agent's request to a running container: {cold} ms by downloading from a registry on this very "
        f"machine, {baked} ms with the layers baked into the guest image, {cold / baked:.1f} times faster, with "
        "the registry stopped and no network."
    )


def _milliseconds(output: str) -> int:
    """The time to a running container, from the agent's output."""
    found = re.search(r"running after ([\d.]+) (m?s)", output)
    if found is None or "= 42" not in output:
        raise DemoFailed("the container did not run")
    return round(float(found[1]) * (1000 if found[2] == "s" else 1))


def _libraries(kept: Path) -> Path:
    """The dependencies of guestpull for the guest's Python; kept until they change."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    wanted: list[str] = project["dependencies"]
    libraries = kept / f"libraries-{sha256(repr(wanted).encode()).hexdigest()[:12]}"
    if not libraries.exists():
        _say("fetching the libraries that guestpull needs, for the guest's Python (once; they are kept)")
        making = kept / "libraries-making"
        shutil.rmtree(making, ignore_errors=True)
        command = [
            sys.executable,
            "-P",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--target",
        ]
        command += [
            str(making),
            "--only-binary=:all:",
            "--implementation=cp",
            f"--python-version={_GUEST_PYTHON}",
        ]
        for manylinux in ("manylinux2014", "manylinux_2_17", "manylinux_2_28", "manylinux_2_34"):
            command.append(f"--platform={manylinux}_{platform.machine()}")
        run(*command, *wanted)
        making.rename(libraries)
    return libraries


def _write(path: Path, content: str, mode: int) -> None:
    path.write_text(content)
    path.chmod(mode)


def _say(text: str) -> None:
    sys.stdout.write(f"demo: {text}\n")
    sys.stdout.flush()
