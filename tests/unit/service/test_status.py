"""The core's errors as google.rpc.Status."""

from __future__ import annotations

import inspect

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from guestpull_server import errors
from guestpull_server.errors import GuestpullError, ImageNotPresent
from guestpull_server.service.status import status_of


def _details(status: grpc.Status) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo]:
    metadata = dict(status.trailing_metadata or ())
    details = metadata["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    message = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo()
    assert message.details[0].Unpack(info)
    return message, info


def test_an_error_carries_its_code_its_reason_and_its_facts() -> None:
    status = status_of(ImageNotPresent("busybox"), "0badcafe")
    message, info = _details(status)

    assert status.code is grpc.StatusCode.NOT_FOUND
    assert (info.reason, info.domain) == ("IMAGE_NOT_PRESENT", "guestpull")
    assert info.metadata["image"] == "busybox"
    assert info.metadata["request_id"] == "0badcafe"
    assert message.message == status.details
    assert "0badcafe" in message.message


def test_a_bug_tells_the_client_nothing_but_the_requests_id() -> None:
    status = status_of(ZeroDivisionError("secret"), "0badcafe")

    assert status.code is grpc.StatusCode.INTERNAL
    assert status.details is not None
    assert "secret" not in status.details
    assert "0badcafe" in status.details


CLASSES = [
    one
    for _, one in inspect.getmembers(errors, inspect.isclass)
    if issubclass(one, GuestpullError) and one is not GuestpullError
]


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda one: one.__name__)
def test_every_error_has_a_code_and_a_reason_of_its_own(error_class: type[GuestpullError]) -> None:
    assert grpc.StatusCode[error_class.status.value] is not grpc.StatusCode.OK
    assert [one.reason for one in CLASSES].count(error_class.reason) == 1
