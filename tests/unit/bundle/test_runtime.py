"""Image config -> runtime config."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from guestpull_server.errors import BundleExists, InvalidManifest, LimitExceeded
from support.bundles import write_config


def converted(directory: Path, process: dict[str, Any] | None, **config: Any) -> dict[str, Any]:
    rootfs = directory / "rootfs"
    rootfs.mkdir()
    document = {"architecture": "arm64", "os": "linux", "config": process, **config}
    write_config(directory, json.dumps(document).encode())
    written: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return written


def test_the_process_is_the_images(tmp_path: Path) -> None:
    spec = converted(
        tmp_path,
        {
            "Entrypoint": ["/entry", "point"],
            "Cmd": ["--flag"],
            "Env": ["PATH=/own", "A=b=c"],
            "WorkingDir": "/srv",
            "User": "5:6",
        },
    )

    assert spec["process"]["args"] == ["/entry", "point", "--flag"]
    assert spec["process"]["env"] == ["PATH=/own", "A=b=c"]
    assert spec["process"]["cwd"] == "/srv"
    assert spec["process"]["user"] == {"uid": 5, "gid": 6, "additionalGids": [6]}
    assert spec["process"]["terminal"] is False
    assert spec["root"] == {"path": "rootfs", "readonly": False}


@pytest.mark.parametrize("process", [None, {}, {"Cmd": None, "Env": None, "Entrypoint": None, "User": ""}])
def test_an_empty_image_config_gets_defaults_that_start(
    tmp_path: Path, process: dict[str, Any] | None
) -> None:
    spec = converted(tmp_path, process)

    assert spec["process"]["args"] == ["sh"]
    assert spec["process"]["cwd"] == "/"
    assert [one.partition("=")[0] for one in spec["process"]["env"]] == ["PATH"]
    assert spec["process"]["user"]["uid"] == 0


def test_null_values_count_as_absent(tmp_path: Path) -> None:
    nothing = dict.fromkeys(
        ("User", "Env", "Entrypoint", "Cmd", "WorkingDir", "Volumes", "ExposedPorts", "StopSignal")
    )

    spec = converted(
        tmp_path,
        {**nothing, "Labels": {"mark": None}},
        **dict.fromkeys(("architecture", "os", "variant", "os.version", "os.features", "author", "created")),
        rootfs={"type": None, "diff_ids": None},
    )

    assert spec["process"]["args"] == ["sh"]
    assert spec["annotations"] == {"mark": ""}


def test_an_entrypoint_with_one_empty_string_counts_as_absent(tmp_path: Path) -> None:
    spec = converted(tmp_path, {"Entrypoint": [""], "Cmd": ["/bin/tool", ""]})

    assert spec["process"]["args"] == ["/bin/tool", ""]


def test_a_variable_without_a_name_or_a_value_is_skipped(tmp_path: Path) -> None:
    spec = converted(tmp_path, {"Env": ["PATH=/bin", "DEBUG", "EMPTY=", "", "=C:=1"]})

    assert spec["process"]["env"] == ["PATH=/bin", "EMPTY="]


def test_other_fields_become_annotations_and_labels_override_them(tmp_path: Path) -> None:
    spec = converted(
        tmp_path,
        {
            "StopSignal": "SIGQUIT",
            "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
            "Labels": {"org.opencontainers.image.author": "label", "own": "label"},
        },
        author="field",
        created="2026-01-01T00:00:00Z",
        variant="v8",
        **{"os.version": "1.2", "os.features": ["one", "two"]},
    )

    prefix = "org.opencontainers.image."
    assert spec["annotations"] == {
        f"{prefix}os": "linux",
        f"{prefix}os.version": "1.2",
        f"{prefix}os.features": '["one","two"]',
        f"{prefix}architecture": "arm64",
        f"{prefix}variant": "v8",
        f"{prefix}author": "label",
        f"{prefix}created": "2026-01-01T00:00:00Z",
        f"{prefix}stopSignal": "SIGQUIT",
        f"{prefix}exposedPorts": "53/udp,80/tcp",
        "own": "label",
    }


def test_labels_that_would_control_a_runtime_are_omitted_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steering = {
        "bundle": "/",
        "cdi.k8s.io/gpu": "nvidia.com/gpu=all",
        "dev.gvisor.spec.mount.x": "/",
        "io.katacontainers.config.hypervisor.path": "/evil",
        "io.kubernetes.cri.container-type": "sandbox",
        "krun.cpus": "64",
        "module.wasm.image/variant": "compat",
        "org.criu.config": "/evil",
        "org.systemd.property.MemoryMax": "uint64 1",
        "run.oci.hooks.stdout": "/etc/shadow",
        "run.oci.keep_original_groups": "1",
    }
    harmless = {"bundled": "yes", "org.opencontainers.image.title": "shop", "run.ocean": "deep"}

    spec = converted(tmp_path, {"Labels": steering | harmless})

    assert {name: spec["annotations"].get(name) for name in harmless} == harmless
    assert spec["annotations"].keys() & steering.keys() == set()
    (record,) = caplog.records
    assert "run.oci" not in record.getMessage()
    assert "io.katacontainers.config.hypervisor.path" in vars(record)["fields"]["labels"]


def test_harmless_labels_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    converted(tmp_path, {"Labels": {"maintainer": "ann"}})

    assert caplog.records == []


@pytest.mark.parametrize(
    "process",
    [
        {"Env": ["A=\0"]},
        {"Cmd": ["sh", "\0"]},
        {"Entrypoint": ["\0"]},
        {"WorkingDir": "/\0"},
        {"Volumes": {"/a\0b": {}}},
        {"Labels": {"a": "\0"}},
        {"Labels": {"a\0": "b"}},
        {"StopSignal": "\0"},
        {"ExposedPorts": {"80\0": {}}},
    ],
)
def test_a_nul_byte_is_refused_with_its_place(tmp_path: Path, process: dict[str, Any]) -> None:
    with pytest.raises(InvalidManifest, match="NUL"):
        converted(tmp_path, process)

    assert not (tmp_path / "config.json").exists()


def test_a_text_that_looks_like_a_nul_is_accepted(tmp_path: Path) -> None:
    spec = converted(tmp_path, {"Cmd": ["printf", "\\u0000"]})

    assert spec["process"]["args"] == ["printf", "\\u0000"]


def test_a_container_has_a_devices_rule_and_namespaces_of_its_own(tmp_path: Path) -> None:
    spec = converted(tmp_path, {})

    assert spec["linux"]["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    kinds = {one["type"] for one in spec["linux"]["namespaces"]}
    assert kinds == {"pid", "network", "ipc", "uts", "mount", "cgroup"}
    assert "CAP_SYS_ADMIN" not in spec["process"]["capabilities"]["bounding"]
    assert "/proc/kcore" in spec["linux"]["maskedPaths"]


def test_volumes_are_mounts_after_those_that_every_container_has(tmp_path: Path) -> None:
    spec = converted(tmp_path, {"Volumes": {"/srv/b": {}, "/srv/a": {}}})

    destinations = [mount["destination"] for mount in spec["mounts"]]
    assert destinations[0] == "/proc"
    assert destinations[-2:] == ["/srv/a", "/srv/b"]


STRINGS = [f"A{number}=" for number in range(60_000)]


@pytest.mark.parametrize(
    "process",
    [
        {"Env": STRINGS, "Cmd": STRINGS},
        {"Entrypoint": STRINGS, "Cmd": STRINGS},
        {"Labels": dict.fromkeys(STRINGS, "")},
        {"ExposedPorts": {string: {} for string in STRINGS}, "Env": STRINGS},
        {"Volumes": {string: {} for string in STRINGS}, "Env": STRINGS},
    ],
)
def test_an_image_config_of_too_many_strings_is_refused_by_its_limit(
    tmp_path: Path, process: dict[str, Any]
) -> None:
    with pytest.raises(LimitExceeded) as caught:
        converted(tmp_path, process)

    assert caught.value.limit == "max_config_strings"
    assert os.listdir(tmp_path) == ["rootfs"]


@pytest.mark.parametrize("strings", ["Env", "Cmd", "Labels", "ExposedPorts"])
def test_a_config_with_the_maximum_of_strings_is_not_much_larger_than_the_image_s(
    tmp_path: Path, strings: str
) -> None:
    many = STRINGS[:49_000]
    process = {strings: many if strings in ("Env", "Cmd") else dict.fromkeys(many, "")}

    converted(tmp_path, process)

    assert (tmp_path / "config.json").stat().st_size < 2 * len(json.dumps(process))


@pytest.fixture(params=[True, False], ids=["O_TMPFILE", "no O_TMPFILE"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows files without names, and one that does not."""
    if request.param:
        return
    opened = os.open

    def without_unnamed_files(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return opened(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", without_unnamed_files)


def test_a_writer_that_is_killed_leaves_no_name_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_arguments: object, **_options: object) -> None:
        assert os.listdir(tmp_path) == ["rootfs"]
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", cut_off)

    with pytest.raises(KeyboardInterrupt):
        converted(tmp_path, {})


@pytest.mark.usefixtures("file_system")
def test_an_existing_config_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("precious")

    with pytest.raises(BundleExists):
        converted(tmp_path, {})

    assert (tmp_path / "config.json").read_text() == "precious"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["config.json", "rootfs"]


@pytest.mark.usefixtures("file_system")
def test_the_file_is_readable_for_all_with_any_umask_and_no_other_file_is_left(
    tmp_path: Path,
) -> None:
    before = os.umask(0o077)
    try:
        converted(tmp_path, {})
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "config.json").stat().st_mode) == 0o644
    assert sorted(one.name for one in tmp_path.iterdir()) == ["config.json", "rootfs"]


@pytest.mark.parametrize("config", [b"", b"[]", b'{"config": {"Env": "A=b"}}', b"\xff", b"[" * 100_000])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, config: bytes) -> None:
    with pytest.raises(InvalidManifest):
        write_config(tmp_path, config)
