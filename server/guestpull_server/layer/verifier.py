"""The verifying worker: a child process that proves one layer, and reports what it found.

It is forked by the fork server, as the workers that unpack are: several at once keep as many cores busy, which
threads do not, and what they remember of a layer's entries goes with them.
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
    """Be a verifying worker: give up what it does not need, verify, report. The process is to end then.

    Args:
        request: what to do.
        report_socket: takes the verdict.
        parent: the process that must outlive this one.
    """
    gc.disable()  # the expected tree lives as long as this process; looking through it again is of no use
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
        verdict = Refused("confine a layer worker to reading", error.strerror or str(error), full=False)
    except StorageFailed as error:
        verdict = Refused(error.doing, f"{error.path}: {error.problem}", full=False)
    except GuestpullError as error:
        verdict = Refused("verifying a layer", str(error), full=False)
    report_socket.sendall(msgspec.json.encode(verdict))
