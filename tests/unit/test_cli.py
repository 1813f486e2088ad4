"""The command line `guestpulld`, as far as it does not need root: output and exit status."""

from __future__ import annotations

import configparser
import json
import os
import re
from importlib.resources import files
from pathlib import Path

import pytest

from guestpull_server.cli import main
from support.command_lines import (
    CommandLine,
    command_line,
    into_closed_pipe,
    into_full_disk,
    with_few_descriptors,
)
from support.peers import run


@pytest.fixture
def guestpulld(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return command_line(main, "guestpulld", monkeypatch, capsys)


@pytest.fixture
def work_dir(tmp_path: Path) -> Path:
    """A work directory with a foreign directory, whose name is not UTF-8 and has control characters."""
    os.makedirs(os.fsencode(tmp_path) + b"/layers/x\xff\x1b[2J\n")
    return tmp_path


def test_control_characters_in_names_are_escaped(guestpulld: CommandLine, work_dir: Path) -> None:
    outcome = guestpulld("gc", "--dry-run", "--work-dir", str(work_dir))

    assert outcome.status == 0
    first, _ = outcome.out.splitlines()
    assert first.startswith(rf"would delete {work_dir}/layers/x\udcff\x1b[2J\n: ")


@pytest.mark.parametrize("command", [["gc", "--dry-run"], ["verify"], ["verify", "--deep"]])
def test_json_preserves_names_that_are_not_utf8(
    guestpulld: CommandLine, work_dir: Path, command: list[str]
) -> None:
    outcome = guestpulld(*command, "--json", "--work-dir", str(work_dir))

    assert f"{work_dir}/layers/x\udcff\x1b[2J\n" in str_leaves(json.loads(outcome.out))


def str_leaves(document: object) -> list[str]:
    """Return all strings in a JSON document."""
    match document:
        case str():
            return [document]
        case dict():
            return [leaf for one in document.values() for leaf in str_leaves(one)]
        case list():
            return [leaf for one in document for leaf in str_leaves(one)]
        case _:
            return []


@pytest.mark.parametrize(
    "arguments",
    [
        ("gc", "--work-dir", ""),
        ("bake", "--work-dir", "/w", "--guest-work-dir", "", "busybox"),
        ("serve", "--work-dir", "/w", "--grace", "inf"),
        ("serve", "--work-dir", "/w", "--listen", "nonsense"),
    ],
)
def test_an_invalid_option_is_a_usage_error(guestpulld: CommandLine, arguments: tuple[str, ...]) -> None:
    assert guestpulld(*arguments).status == 2


def test_credentials_without_a_user_are_refused(guestpulld: CommandLine, work_dir: Path) -> None:
    refused = guestpulld("bake", "--work-dir", str(work_dir), "--auth", ":s3cr3t", "busybox")

    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("guestpulld: --auth: it has no user and password.")


@pytest.mark.parametrize("command", ["serve", "bake oci:/images", "verify --deep", "gc"])
def test_too_few_descriptors_are_refused_with_a_remedy(work_dir: Path, command: str) -> None:
    words = [*command.split(), "--work-dir", str(work_dir)]

    ended = with_few_descriptors(16, "guestpull_server.cli", words)

    expected = (
        "guestpulld: The limit of open files is 16; guestpulld needs 64, and more for each pull. Raise it "
    )
    assert (ended.status, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert ended.err.startswith(expected)


BUFFERED = pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
PRINTING = pytest.mark.parametrize(
    "command",
    [
        "gc --dry-run --work-dir {}",
        "verify --work-dir {}",
        "verify --json --work-dir {}",
        "--help",
        "serve --help",
        "--version",
    ],
)


@BUFFERED
@PRINTING
def test_a_full_standard_output_is_an_error_in_one_line(work_dir: Path, command: str, buffered: bool) -> None:
    words = command.format(work_dir).split()

    ended = into_full_disk("guestpull_server.cli", words, buffered=buffered)

    assert ended.status == 1
    assert re.fullmatch(r"guestpulld: .*No space left on device\.?\n", ended.err)


@BUFFERED
@PRINTING
def test_a_reader_that_stops_early_is_not_an_error(work_dir: Path, command: str, buffered: bool) -> None:
    words = command.format(work_dir).split()

    assert into_closed_pipe("guestpull_server.cli", words, buffered=buffered).err == ""


def test_the_systemd_unit_is_valid_and_starts_this_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "a b" / "guestpulld"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.argv", [str(program), "systemd-unit"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = capfd.readouterr().out
    unit = tmp_path / "guestpulld.service"
    unit.write_text(printed)

    verified = run("systemd-analyze", "verify", str(unit), check=False)

    assert f'ExecStart="{program}" serve' in printed.splitlines()
    assert (verified.returncode, verified.stderr) == (0, "")


_OWN_MOUNT_NAMESPACE = (
    "PrivateTmp PrivateDevices PrivateMounts ProtectSystem ProtectHome ProtectKernelTunables ProtectKernelModules "
    "ProtectKernelLogs ProtectControlGroups ProtectProc ProcSubset ReadOnlyPaths ReadWritePaths InaccessiblePaths "
    "ProtectHostname DynamicUser RootDirectory BindPaths TemporaryFileSystem MountFlags"
)


def test_the_systemd_unit_keeps_the_host_s_mount_namespace() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.read_string(files("guestpull_server.service").joinpath("guestpulld.service").read_text())

    assert unit["Service"]["Type"] == "notify"
    assert not {name.lower() for name in _OWN_MOUNT_NAMESPACE.split()} & unit["Service"].keys()
