"""The kata-agent stand-in: an image pulled in the guest becomes a container, and nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, mounts_below
from support.faults import Stall
from support.images import file, image, layer
from support.samples import runnable
from support.simulator import RegistrySimulator
from support.waiting import PATIENCE, until

SHOP = image(
    runnable(),
    layer(file("srv/goods", b"apples\n")),
    process={
        "Entrypoint": ["sh", "-c"],
        "Cmd": ["cat goods; echo $MODE"],
        "Env": ["PATH=/bin", "MODE=image"],
        "WorkingDir": "/srv",
        "User": "shop",
    },
)


class Agent:
    """`guestpull-agent` as a program, with containers of its own."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.bundle_root = daemon.disk / "containers"

    def start(self, command: str, *arguments: str) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "guestpull_client.agent.cli"]
        options = ["--bundle-root", str(self.bundle_root)]
        return subprocess.Popen(
            [*program, "--address", f"unix://{self.daemon.socket}", command, *options, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command: str, *arguments: str) -> tuple[int, str, str]:
        """A command to its end: its status, and what it said."""
        return ended(self.start(command, *arguments))

    def leftovers(self) -> list[str]:
        """What a container that has ended must not leave."""
        bundles = [bundle.bundle_path for bundle in self.daemon.client.bundles()]
        directories = [str(path) for path in self.bundle_root.glob("*")]
        overlays = [str(path) for path in (self.daemon.work_dir / "overlay").glob("*/*")]
        return [*bundles, *directories, *overlays, *mounts_below(self.bundle_root)]


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


@pytest.fixture
def agent(daemon: Daemon) -> Agent:
    return Agent(daemon)


@pytest.fixture
def shop(registry: RegistrySimulator) -> str:
    return registry.push("shop:1.0", SHOP)


@pytest.fixture
def container_id() -> Iterator[str]:
    """An id for a container whose end a test decides; runc's state of it is gone afterwards, whatever happens."""
    name = f"guestpull-test-{os.getpid()}"
    yield name
    assert not Path("/run/runc", name).exists()


def request_of(reference: str, container_id: str, specification: object) -> dict[str, object]:
    """As Kata's shim makes it."""
    return {
        "container_id": container_id,
        "storages": [
            {
                "driver": "image_guest_pull",
                "driver_options": [
                    'image_guest_pull={"metadata":{"io.kubernetes.cri.container-type":"container"}}'
                ],
                "source": reference,
                "fstype": "overlay",
                "options": [],
                "mount_point": f"/run/kata-containers/{container_id}/rootfs",
            }
        ],
        "OCI": specification,
    }


# -- the short form ----------------------------------------------------------------------------------------------


def test_an_image_s_own_command_is_run_as_the_image_says(agent: Agent, shop: str) -> None:
    assert agent.run("run", shop) == (0, "apples\nimage\n", "")
    assert agent.leftovers() == []


def test_crun_serves_as_well_as_runc(agent: Agent, shop: str, tmp_path: Path) -> None:
    crun = tmp_path / "crun"
    # crun refuses machines with both versions of cgroups; there it is shown one
    one = "if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi"
    crun.write_text(f'#!/bin/sh\nexec unshare --mount sh -c \'{one}; exec crun "$@"\' crun "$@"\n')
    crun.chmod(0o755)

    assert agent.run("run", shop, "--runtime", str(crun)) == (0, "apples\nimage\n", "")
    assert agent.leftovers() == []


def test_a_command_replaces_the_image_s_and_variables_come_on_top(agent: Agent, shop: str) -> None:
    status, out, _ = agent.run("run", shop, "-e", "MODE=given", "--", "sh", "-c", "id -un; pwd; echo $MODE")

    assert (status, out) == (0, "shop\n/srv\ngiven\n")


def test_the_exit_status_is_the_container_s(agent: Agent, shop: str) -> None:
    assert agent.run("run", shop, "--", "sh", "-c", "exit 7") == (7, "", "")
    assert agent.leftovers() == []


def test_standard_input_is_the_container_s_after_the_credentials(agent: Agent, shop: str) -> None:
    container = agent.start("run", shop, "--auth-stdin", "--", "cat")

    out, _ = container.communicate("user:password\nrest\nof it\n", timeout=PATIENCE)

    assert out == "rest\nof it\n"


def test_times_are_printed_in_the_order_of_the_steps(agent: Agent, shop: str) -> None:
    _, out, err = agent.run("run", shop, "--time")

    assert out == "apples\nimage\n"
    assert [line.split(": ")[1].split(" ")[0] for line in err.splitlines()] == ["pulled", "running", "ended"]


def test_a_kept_bundle_can_be_released_later(agent: Agent, shop: str) -> None:
    status, _, _ = agent.run("run", shop, "--keep", "--name", "kept")
    bundle = agent.bundle_root / "kept"

    assert status == 0
    assert (bundle / "rootfs/srv/goods").read_text() == "apples\n"
    assert [one.bundle_path for one in agent.daemon.client.bundles()] == [str(bundle)]

    agent.daemon.client.release_bundle(str(bundle))
    assert agent.leftovers() == []


# -- Kata's request ----------------------------------------------------------------------------------------------


def test_a_kata_request_runs_the_pod_s_process_in_the_pulled_image(
    agent: Agent, shop: str, tmp_path: Path, container_id: str
) -> None:
    specification = {
        "Version": "1.1.0",
        "Process": {
            "Terminal": False,
            "User": {"UID": 1000, "GID": 1000, "AdditionalGids": [1000], "Username": ""},
            "Args": [
                "sh",
                "-c",
                "id -u; pwd; echo $MODE; cat goods; cat /proc/sys/kernel/hostname; ulimit -n; touch /x 2>&1",
            ],
            "Env": ["MODE=pod"],
            "Cwd": "/",
            "Rlimits": [{"Type": "RLIMIT_NOFILE", "Hard": "77", "Soft": "77"}],
            "NoNewPrivileges": True,
        },
        "Root": {"Path": "/run/kata-containers/shared/rootfs", "Readonly": True},
        "Hostname": "pod",
        "Mounts": [{"destination": "/proc", "source": "proc", "type_": "proc", "options": ["nosuid"]}],
        "Hooks": None,
        "Annotations": {"io.kubernetes.cri.container-name": "shop"},
        "Linux": {
            "UIDMappings": [],
            "Namespaces": [{"Type": kind, "Path": ""} for kind in ("ipc", "uts", "mount", "pid")],
            "MaskedPaths": ["/proc/kcore"],
            "Seccomp": None,
            "Resources": {"CPU": {"Shares": "100", "Cpus": ""}, "Memory": None},
        },
        "Solaris": None,
    }
    request = tmp_path / "request.json"
    request.write_text(json.dumps(request_of(shop, container_id, specification)))

    status, out, err = agent.run("create", "--request", str(request))

    assert out.splitlines() == [
        *("1000", "/srv", "pod", "apples", "pod", "77"),
        "touch: /x: Read-only file system",
    ]
    assert (status, err) == (1, "")
    assert agent.leftovers() == []


def test_a_request_can_be_read_from_standard_input(agent: Agent, shop: str, container_id: str) -> None:
    container = agent.start("create", "--request", "-")
    request = request_of(shop, container_id, {"process": {"args": ["echo", "by hand"]}})

    out, _ = container.communicate(json.dumps(request), timeout=PATIENCE)

    assert (container.returncode, out) == (0, "by hand\n")


def test_a_sandbox_runs_the_guest_s_pause_image_and_pulls_nothing(
    agent: Agent, registry: RegistrySimulator, shop: str, tmp_path: Path, container_id: str
) -> None:
    pause = tmp_path / "pause_bundle"
    (pause / "rootfs/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", pause / "rootfs/bin/busybox")
    process = {"args": ["/bin/busybox", "echo", "paused"], "cwd": "/", "user": {"uid": 0, "gid": 0}}
    specification = {
        "ociVersion": "1.0.2",
        "process": process,
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount")]},
    }
    (pause / "config.json").write_text(json.dumps(specification))
    annotations = {"io.kubernetes.cri.container-type": "sandbox"}
    request = tmp_path / "request.json"
    request.write_text(json.dumps(request_of(shop, container_id, {"Annotations": annotations})))

    outcome = agent.run("create", "--request", str(request), "--pause-bundle", str(pause))

    assert outcome == (0, "paused\n", "")
    assert registry.requests == []
    assert agent.leftovers() == []


# -- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_failed_pull_is_reported_in_one_line_and_leaves_nothing(
    agent: Agent, registry: RegistrySimulator
) -> None:
    status, out, err = agent.run("run", f"{registry.host}/none:1")

    assert (status, out) == (1, "")
    assert err.startswith(f"guestpull-agent: {registry.host}/none:1")
    assert err.count("\n") == 1
    assert agent.leftovers() == []


def test_a_missing_runtime_is_reported_in_one_line_and_leaves_nothing(agent: Agent, shop: str) -> None:
    status, _, err = agent.run("run", shop, "--runtime", "/none/runc")

    assert status == 1
    assert err.startswith("guestpull-agent: Cannot start /none/runc")
    assert agent.leftovers() == []


def test_a_command_that_is_not_in_the_image_leaves_nothing(agent: Agent, shop: str) -> None:
    status, _, err = agent.run("run", shop, "--", "no-such-program")

    assert status != 0
    assert "no-such-program" in err
    assert agent.leftovers() == []


def test_a_container_that_exists_is_refused_and_unharmed(agent: Agent, shop: str) -> None:
    agent.run("run", shop, "--keep", "--name", "kept")

    status, _, err = agent.run("run", shop, "--name", "kept")

    assert status == 1
    assert "container kept exists" in err
    assert (agent.bundle_root / "kept/rootfs/srv/goods").exists()


# -- signals -----------------------------------------------------------------------------------------------------

HEARS = "trap 'echo heard; exit 3' TERM INT; echo ready; while :; do sleep 0.05; done"
DEAF = "trap '' TERM INT HUP QUIT; echo ready; while :; do sleep 0.05; done"


def test_a_signal_reaches_the_container_and_the_bundle_is_released(
    agent: Agent, shop: str, container_id: str
) -> None:
    container = agent.start("run", shop, "--name", container_id, "--", "sh", "-c", HEARS)
    assert container.stdout is not None
    assert container.stdout.readline() == "ready\n"

    container.send_signal(signal.SIGTERM)

    assert ended(container) == (3, "heard\n", "")
    assert agent.leftovers() == []


def test_a_container_that_ignores_signals_is_killed_at_the_third(
    agent: Agent, shop: str, container_id: str
) -> None:
    container = agent.start("run", shop, "--name", container_id, "--", "sh", "-c", DEAF)
    assert container.stdout is not None
    assert container.stdout.readline() == "ready\n"

    for one in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # those of one kind that come at once are one
        container.send_signal(one)

    assert ended(container)[0] == 128 + signal.SIGKILL
    assert agent.leftovers() == []


def test_a_container_that_ignores_sigterm_is_killed_after_the_stop_timeout(
    agent: Agent, shop: str, container_id: str
) -> None:
    options = ("--name", container_id, "--stop-timeout", "0.2")
    container = agent.start("run", shop, *options, "--", "sh", "-c", DEAF)
    assert container.stdout is not None
    assert container.stdout.readline() == "ready\n"

    container.send_signal(signal.SIGTERM)

    assert ended(container)[0] == 128 + signal.SIGKILL
    assert agent.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_pull_cancels_it_and_leaves_nothing(
    agent: Agent, registry: RegistrySimulator, shop: str, number: signal.Signals
) -> None:
    registry.fault(SHOP.layers[0], Stall(after=0.5))
    container = agent.start("run", shop)
    until("the layer is downloaded", lambda: registry.requests_for(SHOP.layers[0]))

    container.send_signal(number)

    assert ended(container)[0] == 128 + number
    until("nothing is left of it", lambda: agent.leftovers() == [])


def test_a_runtime_that_is_killed_leaves_no_container(agent: Agent, shop: str, container_id: str) -> None:
    container = agent.start("run", shop, "--name", container_id, "--", "sh", "-c", DEAF)
    assert container.stdout is not None
    assert container.stdout.readline() == "ready\n"
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()

    for child in children:
        os.kill(int(child), signal.SIGKILL)

    assert ended(container)[0] == 128 + signal.SIGKILL
    assert agent.leftovers() == []


# -- terminals ---------------------------------------------------------------------------------------------------


class Terminal:
    """The agent at a terminal of its own, where a person types."""

    def __init__(self, agent: Agent, *arguments: str) -> None:
        self._descriptor, other = pty.openpty()
        program = [sys.executable, "-m", "guestpull_client.agent.cli"]
        address = f"unix://{agent.daemon.socket}"
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *program, "--address", address, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
        )
        os.close(other)
        self._shown = select.poll()
        self._shown.register(self._descriptor, select.POLLIN)
        self._seen = b""

    def shows(self, text: bytes) -> None:
        """Wait until a text is there that was not there before."""
        while text not in self._seen:
            assert self._shown.poll(PATIENCE * 1000), f"{text!r} is not shown, but {self._seen!r}"
            self._seen += os.read(self._descriptor, 4096)
        self._seen = self._seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self._descriptor, text)

    def end(self) -> tuple[int, bytes]:
        """Wait for the end; returns the status, and what else was shown."""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while chunk := os.read(self._descriptor, 4096):
                self._seen += chunk
        os.close(self._descriptor)
        return self._process.wait(PATIENCE), self._seen


def test_a_pod_that_wants_a_terminal_gets_the_agent_s(
    agent: Agent, shop: str, tmp_path: Path, container_id: str
) -> None:
    request = tmp_path / "request.json"
    specification = {
        "Process": {"Terminal": True, "Args": ["sh", "-c", "read x; test -t 0 && echo $x-$x; exit 4"]}
    }
    request.write_text(json.dumps(request_of(shop, container_id, specification)))

    terminal = Terminal(agent, "create", "--bundle-root", str(agent.bundle_root), "--request", str(request))
    terminal.type(b"typed\n")

    terminal.shows(b"typed-typed")
    assert terminal.end()[0] == 4
    assert agent.leftovers() == []


def test_ctrl_c_reaches_a_container_without_a_terminal_once(
    agent: Agent, shop: str, container_id: str
) -> None:
    counts = (
        "trap 'echo heard; n=1' INT; echo ready; while test -z $n; do sleep 0.05; done; sleep 0.3; exit 5"
    )
    terminal = Terminal(
        agent,
        *("run", "--bundle-root", str(agent.bundle_root), "--name", container_id),
        *(shop, "--", "sh", "-c", counts),
    )
    terminal.shows(b"ready")

    terminal.type(b"\x03")

    terminal.shows(b"heard")
    status, rest = terminal.end()
    assert (status, b"heard" in rest) == (5, False)
    assert agent.leftovers() == []
