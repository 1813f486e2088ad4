"""The verifying worker: a process that verifies one layer and reports what differs.

The fork server forks it like the workers that unpack. Several of them use as many cores, which threads would not,
and the memory for the expected tree is freed with the process.
"""

from __future__ import annotations

import gc
import socket

import msgspec

from guestpull_server.errors import GuestpullError, StorageFailed
from guestpull_server.layer.confinement import confine_to_reading
from guestpull_server.layer.proof import verify_layer
from guestpull_server.layer.worker_protocol import Refused, Verdict, Verified, VerifyRequest
from guestpull_server.models import Digest


def run(request: VerifyRequest, report_socket: socket.socket, parent: int) -> None:
    """Drop what is not needed to read, verify, report. The process must end afterwards.

    Args:
        request: what to verify.
        report_socket: receives the verdict.
        parent: the parent process; this process is killed when the parent ends.
    """
    gc.disable()  # the expected tree lives as long as the process; collecting garbage would only traverse it
    verdict: Verdict
    try:
        confine_to_reading(parent)
        found = verify_layer(
            request.directory,
            request.tar_split_path,
            Digest(request.diff_id),
            implied=request.implied,
            limits=request.limits,
        )
        verdict = Verified(list(found))
    except OSError as error:
        verdict = Refused("confining a layer worker to reading", error.strerror or str(error), full=False)
    except StorageFailed as error:
        verdict = Refused(error.doing, f"{error.path}: {error.problem}", full=False)
    except GuestpullError as error:
        verdict = Refused("verifying a layer", str(error), full=False)
    report_socket.sendall(msgspec.json.encode(verdict))
