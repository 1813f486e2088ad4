"""Proof: what is reused is what the image's own digest says, or it is named, and downloaded again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guestpull_client import PullPolicy
from guestpull_client.errors import DataLoss
from support.daemon import Daemon
from support.images import files, image, layer
from support.peers import run
from support.samples import everything, runnable
from support.simulator import RegistrySimulator


def verify(work_dir: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "guestpull_server.cli", "verify", "--work-dir", str(work_dir), *options]
    return run(*command, check=False)


def same_times(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A change to a file after which its times are what they were."""

    def changed(path: Path) -> None:
        status = path.lstat()
        change(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)

    return changed


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(content)


def replace_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("elsewhere")


CHANGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a byte": ("all/big", same_times(flip_a_byte), "content"),
    "a mode": ("all/noted", lambda path: path.chmod(0o600), "mode"),
    "an owner": ("all/noted", lambda path: os.chown(path, 7, 8), "owner"),
    "a time": ("all/noted", lambda path: os.utime(path, (1, 1)), "time"),
    "a link": ("all/dangling", same_times(replace_link), "link target"),
    "an xattr": ("all/noted", lambda path: os.setxattr(path, "user.note", b"forged"), "xattr"),
    "a file more": ("all/more", lambda path: path.touch(), "extra"),
    "a file less": ("all/empty", lambda path: path.unlink(), "missing"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_found_named_and_repaired(
    daemon: Daemon, registry: RegistrySimulator, change: str
) -> None:
    kept, altered = runnable(), everything()
    reference = registry.push("proof:1", image(kept, altered))
    daemon.client.pull(reference, str(daemon.bundle("one")))
    daemon.client.release_bundle(str(daemon.bundle("one")))
    sound = verify(daemon.work_dir, "--deep")
    assert sound.returncode == 0, sound.stdout
    path, alter, kind = CHANGES[change]
    where = daemon.work_dir / "layers" / altered.digest.replace(":", "_")
    alter(where / path)

    found = verify(daemon.work_dir, "--deep")

    assert found.returncode == 1
    assert f"{path}: {kind}" in found.stdout
    assert kept.digest not in found.stdout
    daemon.stop()
    repaired = verify(daemon.work_dir, "--deep", "--repair")
    assert repaired.returncode == 0, repaired.stdout
    assert len(registry.requests_for(kept)) == 1
    assert len(registry.requests_for(altered)) == 2
    daemon.start()


def test_a_list_that_was_rewritten_along_with_the_layer_proves_nothing(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    content = runnable()
    reference = registry.push("forged:1", image(content))
    daemon.client.pull(reference, str(daemon.bundle("one")))
    daemon.client.release_bundle(str(daemon.bundle("one")))
    other = image(everything())
    daemon.client.pull(registry.push("forged:2", other), str(daemon.bundle("two")))
    daemon.client.release_bundle(str(daemon.bundle("two")))
    name, stolen = (one.replace(":", "_") for one in (content.digest, other.layers[0].digest))
    (daemon.work_dir / "records" / f"{stolen}.record").replace(daemon.work_dir / "records" / f"{name}.record")

    found = verify(daemon.work_dir, "--deep")

    assert found.returncode == 1
    assert content.digest in found.stdout


def test_always_a_pull_proves_what_it_reuses_and_downloads_what_was_altered(
    disk: Path, registry: RegistrySimulator
) -> None:
    content = runnable()
    reference = registry.push("reuse:1", image(content))
    with Daemon(disk, configuration={"verify_reuse": "always"}) as daemon:
        daemon.client.pull(reference, str(daemon.bundle("one")))
        daemon.client.release_bundle(str(daemon.bundle("one")))
        same_times(flip_a_byte)(daemon.work_dir / "layers" / content.digest.replace(":", "_") / "etc/passwd")

        pulled = daemon.client.pull(reference, str(daemon.bundle("two")), policy=PullPolicy.IF_NOT_PRESENT)

        assert [one.reused for one in pulled.layers] == [False]
        assert (daemon.bundle("two") / "rootfs/etc/passwd").read_bytes().startswith(b"root:x:0:0")
        daemon.client.release_bundle(str(daemon.bundle("two")))
        again = daemon.client.pull(reference, str(daemon.bundle("three")))
        assert [one.reused for one in again.layers] == [True]


def test_an_altered_layer_of_another_store_is_refused_by_name(
    disk: Path, registry: RegistrySimulator
) -> None:
    content = runnable()
    reference = registry.push("shared:1", image(content))
    with Daemon(disk) as first:
        first.client.pull(reference, str(first.bundle("one")))
        first.client.release_bundle(str(first.bundle("one")))
        flip_a_byte(first.work_dir / "layers" / content.digest.replace(":", "_") / "etc/passwd")
        configuration = {"verify_reuse": "mount", "additional_stores": [str(first.work_dir)]}
        with Daemon(disk, work_dir=disk / "second", configuration=configuration) as second:
            with pytest.raises(DataLoss, match="etc/passwd") as caught:
                second.client.pull(reference, str(second.bundle("two")), policy=PullPolicy.NEVER)

            assert caught.value.reason == "LAYER_CHANGED"


def test_a_layer_whose_record_is_gone_is_not_proved_and_is_downloaded_again(
    daemon: Daemon, registry: RegistrySimulator
) -> None:
    content = runnable()
    daemon.client.pull(registry.push("bare:1", image(content)), str(daemon.bundle("one")))
    daemon.client.release_bundle(str(daemon.bundle("one")))
    for record in (daemon.work_dir / "records").glob("*.record"):
        record.unlink()

    found = verify(daemon.work_dir, "--deep")

    assert found.returncode == 1
    assert f"incomplete: layer {content.digest} has no tar-split any more" in found.stdout
    daemon.stop()
    repaired = verify(daemon.work_dir, "--deep", "--repair")
    assert repaired.returncode == 0, repaired.stdout
    assert len(registry.requests_for(content)) == 2
    daemon.start()


def test_pulls_that_find_the_same_layer_altered_at_once_all_get_it_as_it_should_be(
    disk: Path, registry: RegistrySimulator
) -> None:
    many = layer(*files("many", count=2000))
    reference = registry.push("altered:1", image(runnable(), many))
    with Daemon(disk, configuration={"verify_reuse": "always"}) as daemon:
        daemon.client.pull(reference, str(daemon.bundle("one")))
        daemon.client.release_bundle(str(daemon.bundle("one")))
        flip_a_byte(next((daemon.work_dir / "layers" / many.digest.replace(":", "_")).rglob("*7")))

        with ThreadPoolExecutor(8) as pool:
            bundles = [str(daemon.bundle(f"again-{number}")) for number in range(8)]
            pulled = list(pool.map(lambda bundle: daemon.client.pull(reference, bundle), bundles))

        assert sorted(one.downloaded_bytes for one in pulled) == [0] * 7 + [many.size]
        assert verify(daemon.work_dir, "--deep").returncode == 0
