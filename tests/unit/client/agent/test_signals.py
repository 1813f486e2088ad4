"""Signals, as the agent hears them while a program of its runs."""

from __future__ import annotations

import os
import signal
import subprocess

from guestpull_client.agent.signals import Signals
from support.descriptors import many_descriptors_open


def test_a_process_is_waited_for_beside_many_open_descriptors() -> None:
    heard: list[int] = []
    signals = Signals()
    # it ends only once its signal was heard
    command = ["sh", "-c", f"read begin; kill -USR1 {os.getpid()}; read end; exit 7"]

    def end(number: int) -> None:
        heard.append(number)
        assert program.stdin is not None
        program.stdin.close()

    with many_descriptors_open(), signals.installed(), signals.sent_to(end):  # noqa: SIM117
        with subprocess.Popen(command, stdin=subprocess.PIPE) as program:
            assert program.stdin is not None
            program.stdin.write(b"\n")
            program.stdin.flush()
            status = signals.wait_for(program)

    assert (status, heard) == (7, [signal.SIGUSR1])
