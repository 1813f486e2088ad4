"""A rootfs and its config.json, started by runc and crun as they are; and users by the measure of umoci."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestpull_server.config import Limits
from guestpull_server.models import Decoder, Digest, StoredLayer
from guestpull_server.snapshot import OverlayMounts
from support.bundles import mount_layers, write_config
from support.images import file, image, layer
from support.local_images import write_layout
from support.peers import run, run_container, umoci_unpack
from support.samples import BUSYBOX

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nshop:x:1234:1235:shop:/srv:/bin/sh\n7:x:0:0::/:/bin/sh\n"
GROUP = b"root:x:0:root\nwheel:x:10:root,shop\naudit:x:2000:shop\n8:x:0:\n"
APPLETS = ("sh", "cat", "id", "stat", "grep", "env", "pwd", "touch", "ls", "mknod", "rm", "df", "mount")
RUNTIMES = pytest.mark.parametrize("runtime", ["runc", "crun"])


class Bundles:
    """Bundles of an image that is made by hand: busybox below, users and some content above."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._count = 0
        base = self._layer("base")
        (base / "bin").mkdir()
        (base / "bin/busybox").write_bytes(BUSYBOX.read_bytes())
        (base / "bin/busybox").chmod(0o755)
        for applet in APPLETS:
            (base / "bin" / applet).symlink_to("busybox")
        (base / "gone").touch()
        top = self._layer("top")
        os.mknod(top / "gone", stat.S_IFCHR, 0)
        (top / "etc").mkdir()
        (top / "etc/passwd").write_bytes(PASSWD)
        (top / "etc/group").write_bytes(GROUP)
        (top / "srv/shelf").mkdir(parents=True)
        (top / "srv/shelf/tool").write_text("#!/bin/sh\necho from the image\n")
        (top / "srv/shelf/tool").chmod(0o755)
        (top / "srv/proc").symlink_to("../proc")
        os.chown(top / "srv", 1234, 1235)
        (top / "srv").chmod(0o2750)
        self._layers = [self._stored(base), self._stored(top)]

    def make(self, **process: Any) -> Path:
        """A bundle that is mounted and has its config.json."""
        self._count += 1
        bundle = self._disk / f"bundle{self._count}"
        overlay = self._disk / f"overlay{self._count}"
        bundle.mkdir(mode=0o700)  # as the store makes it: no other user reaches what is in there
        (bundle / "rootfs").mkdir()
        overlay.mkdir()
        mount_layers(self._layers, overlay, bundle / "rootfs")
        config = {"os": "linux", "architecture": "amd64", "config": process}
        write_config(bundle, json.dumps(config).encode())
        return bundle

    def run(self, runtime: str, script: str, **process: Any) -> list[str]:
        """What a script prints in a container of its own, line by line."""
        return self.start(runtime, Entrypoint=["sh", "-ec"], Cmd=[script], **process)

    def start(self, runtime: str, **process: Any) -> list[str]:
        """What a container of its own prints, line by line."""
        bundle = self.make(**process)
        name = f"guestpull-test-{os.getpid()}-{self._count}"
        return run_container(str(bundle), name, runtime).splitlines()

    def unmount(self) -> None:
        """Unmount all."""
        for number in range(1, self._count + 1):
            overlay = self._disk / f"overlay{number}"
            assert OverlayMounts().unmount(str(self._disk / f"bundle{number}/rootfs"), str(overlay)) == ()

    def _layer(self, name: str) -> Path:
        path = self._disk / "layers" / name
        path.mkdir(parents=True)
        return path

    def _stored(self, path: Path) -> StoredLayer:
        digest = Digest.of(str(path).encode())
        return StoredLayer(digest, digest, Decoder.GZIP, str(path))


@pytest.fixture
def bundles(disk: Path) -> Iterator[Bundles]:
    made = Bundles(disk)
    yield made
    made.unmount()


@RUNTIMES
def test_a_container_starts_as_its_image_says(bundles: Bundles, runtime: str) -> None:
    script = "pwd; echo $GREETING; id -u; id -g; id -G; cat /srv/shelf/tool; test ! -e /gone; touch /written"

    lines = bundles.run(runtime, script, Env=["GREETING=hello"], WorkingDir="/etc", User="root")

    assert lines[:2] == ["/etc", "hello"]
    assert lines[2:5] == ["0", "0", "0 10"]
    assert lines[5:] == ["#!/bin/sh", "echo from the image"]


@RUNTIMES
@pytest.mark.parametrize(
    "process",
    [
        {"Entrypoint": [""], "Cmd": ["sh", "-c", "echo started"]},
        {"Cmd": ["sh", "-c", "echo started"], "Env": ["DEBUG"]},
        {"Cmd": ["sh", "-c", "echo started"], "WorkingDir": "no/such/../directory"},
    ],
)
def test_images_that_podman_starts_are_started(
    bundles: Bundles, runtime: str, process: dict[str, Any]
) -> None:
    assert bundles.start(runtime, **process) == ["started"]


@RUNTIMES
@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("shop", "1234 1235 1235 10 2000"),
        ("shop:wheel", "1234 10 10"),
        ("1234:4343", "1234 4343 4343"),
    ],
)
def test_a_container_runs_as_its_user(bundles: Bundles, runtime: str, user: str, expected: str) -> None:
    groups = "grep ^Groups: /proc/self/status | { read _ groups; echo $groups; }"

    uid, gid, supplementary = bundles.run(runtime, f"id -u; id -g; {groups}", User=user)

    wanted_uid, wanted_gid, *wanted = expected.split()
    assert (uid, gid) == (wanted_uid, wanted_gid)
    assert sorted(supplementary.split()) == sorted(wanted)


@RUNTIMES
def test_a_volume_without_content_is_a_tmpfs_with_a_size_limit(
    bundles: Bundles, disk: Path, runtime: str
) -> None:
    empty = disk / "layers/top/empty"
    empty.mkdir()
    os.chown(empty, 1234, 1235)
    empty.chmod(0o3751)
    (disk / "layers/top/link").symlink_to("/empty")
    script = "stat -c '%a %u %g' /empty /new; touch /link/written /new/written; df -k /empty /new; mount"

    lines = bundles.run(runtime, script, Volumes={"/link": {}, "/new/": {}, "/proc": {}, "/": {}})

    assert lines[:2] == ["3751 1234 1235", "755 0 0"]
    assert [line.split()[1] for line in lines[3:5]] == ["1048576", "1048576"]
    for place in ("/empty", "/new"):
        (options,) = (line.split()[5] for line in lines if line.split()[2:3] == [place])
        assert {"rw", "nosuid", "nodev"} <= set(options.strip("()").split(","))
        assert not (disk / f"overlay1/upper{place}/written").exists()


@RUNTIMES
def test_a_volume_in_which_the_image_has_content_is_written_in_the_upper_directory(
    bundles: Bundles, disk: Path, runtime: str
) -> None:
    script = "stat -c '%a %u %g' /srv; /srv/shelf/tool; touch /srv/written; ls /srv"

    lines = bundles.run(runtime, script, Volumes={"/srv": {}})

    assert lines == ["2750 1234 1235", "from the image", "proc", "shelf", "written"]
    assert (disk / "overlay1/upper/srv/written").exists()


@RUNTIMES
def test_volumes_may_be_nested(bundles: Bundles, disk: Path, runtime: str) -> None:
    (disk / "layers/top/srv/inner").mkdir()
    script = "touch /a/1 /a/b/2 /srv/3 /srv/inner/4; ls -R /a /srv/inner; mount"

    lines = bundles.run(
        runtime, script, Volumes={"/a/b": {}, "/a": {}, "/srv": {}, "/srv/inner": {}, "/srv/shelf/tool/x": {}}
    )

    places = {line.split()[2] for line in lines if " type tmpfs " in line}
    assert {"/a", "/a/b", "/srv/inner"} <= places
    assert not {"/srv", "/srv/shelf/tool/x"} & places
    upper = disk / "overlay1/upper"
    assert (upper / "srv/3").exists()
    assert [str(one.relative_to(upper)) for one in upper.rglob("[124]")] == []


@RUNTIMES
def test_as_many_volumes_as_may_be_start(bundles: Bundles, runtime: str) -> None:
    volumes: dict[str, Any] = {f"/volumes/{number}": {} for number in range(Limits().max_volumes)}

    lines = bundles.run(runtime, "mount", Volumes=volumes)

    assert {line.split()[2] for line in lines} >= volumes.keys()


@RUNTIMES
@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR])
def test_a_volume_with_devices_or_fifos_does_not_prevent_a_start(
    bundles: Bundles, disk: Path, runtime: str, kind: int
) -> None:
    os.mknod(disk / "layers/top/srv/shelf/special", kind | 0o644, os.makedev(1, 3))

    assert bundles.run(runtime, "ls /srv/shelf", Volumes={"/srv": {}}) == ["special", "tool"]


@RUNTIMES
def test_no_volume_is_mounted_over_proc_by_way_of_a_link(bundles: Bundles, runtime: str) -> None:
    lines = bundles.run(runtime, "cat /proc/mounts", Volumes={"/srv/proc/self": {}, "/srv/proc": {}})

    assert [line for line in lines if line.split()[1:3] in (["/proc", "tmpfs"], ["/proc/1", "tmpfs"])] == []


@RUNTIMES
def test_a_container_is_kept_from_the_machine(bundles: Bundles, runtime: str) -> None:
    script = """
        ls /proc | grep -c '^[0-9]' ; ls /sys/class/net
        grep ^CapEff: /proc/self/status | { read _ capabilities; echo $capabilities; }
        cat /proc/kcore | { read -r line && echo kcore; } || echo masked
        touch /proc/sys/kernel/hostname 2>/dev/null && echo writable || echo read-only
        mknod /mem c 1 1; cat /mem 2>/dev/null && echo read || echo no devices
        test -t 0 && echo terminal || echo no terminal
    """

    lines = bundles.run(runtime, script)

    assert int(lines[0]) <= 4
    assert lines[1] == "lo"
    assert int(lines[2], 16) & (1 << 21) == 0  # CAP_SYS_ADMIN
    assert lines[3:] == ["masked", "read-only", "no devices", "no terminal"]


@RUNTIMES
def test_setuid_programs_may_do_their_work(bundles: Bundles, runtime: str) -> None:
    status = bundles.run(runtime, "cat /proc/self/status; cat /proc/mounts", User="shop")

    assert "NoNewPrivs:\t0" in status
    (options,) = [line.split()[3] for line in status if line.split()[1:2] == ["/"]]
    assert "nosuid" not in options.split(",")


@pytest.mark.parametrize(
    "user",
    [
        "",
        "root",
        "0",
        "shop",
        "1234",
        "shop:wheel",
        "shop:10",
        "4242",
        "4242:4343",
        "7",
        "shop:8",
        "7:8",
        ":audit",
    ],
)
def test_a_user_is_resolved_as_by_umoci(bundles: Bundles, tmp_path: Path, user: str) -> None:
    content = layer(file("etc/passwd", PASSWD), file("etc/group", GROUP))
    write_layout(tmp_path / "layout", {"it": image(content, process={"User": user})})
    umoci_unpack(tmp_path / "layout", "it", tmp_path / "umoci")
    theirs = json.loads((tmp_path / "umoci/config.json").read_bytes())["process"]["user"]

    ours = json.loads((bundles.make(User=user) / "config.json").read_bytes())["process"]["user"]

    assert (ours["uid"], ours["gid"]) == (theirs["uid"], theirs["gid"])
    # umoci leaves the group itself out; podman and containerd have it there (CVE-2022-2989, CVE-2023-25173)
    wanted = {theirs["gid"], *theirs.get("additionalGids", [])}
    assert set(ours["additionalGids"]) == wanted


def test_the_config_matches_what_runc_would_write(bundles: Bundles, tmp_path: Path) -> None:
    run("runc", "spec", "--bundle", str(tmp_path))
    theirs = json.loads((tmp_path / "config.json").read_bytes())

    ours = json.loads((bundles.make() / "config.json").read_bytes())

    assert ours.keys() - {"annotations"} <= theirs.keys()
    assert ours["process"].keys() - {"noNewPrivileges"} <= theirs["process"].keys()
    assert [one["destination"] for one in ours["mounts"]] == [one["destination"] for one in theirs["mounts"]]
    assert {one["type"] for one in theirs["linux"]["namespaces"]} <= {
        one["type"] for one in ours["linux"]["namespaces"]
    }
    assert set(theirs["linux"]["maskedPaths"]) <= set(ours["linux"]["maskedPaths"])
    assert set(theirs["linux"]["readonlyPaths"]) <= set(ours["linux"]["readonlyPaths"])
