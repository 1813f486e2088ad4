"""Converting errors of the core to google.rpc.Status."""

from __future__ import annotations

import base64
import inspect
import string
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from guestpull_server import errors
from guestpull_server.errors import GuestpullError, ImageNotPresent, NoMatchingPlatform
from guestpull_server.service.status import status_of


def _details(status: grpc.Status) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo]:
    metadata = dict(status.trailing_metadata or ())
    details = metadata["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    message = status_pb2.Status.FromString(details)
    info = error_details_pb2.ErrorInfo()
    assert message.details[0].Unpack(info)
    return message, info


def test_a_status_has_the_errors_code_reason_and_fields() -> None:
    status = status_of(ImageNotPresent("busybox"), "0badcafe")
    message, info = _details(status)

    assert status.code is grpc.StatusCode.NOT_FOUND
    assert (info.reason, info.domain) == ("IMAGE_NOT_PRESENT", "guestpull")
    assert info.metadata["image"] == "busybox"
    assert info.metadata["request_id"] == "0badcafe"
    assert message.message == status.details
    assert "0badcafe" in message.message


def test_an_unexpected_exception_reveals_only_the_request_id() -> None:
    status = status_of(ZeroDivisionError("secret"), "0badcafe")

    assert status.code is grpc.StatusCode.INTERNAL
    assert status.details is not None
    assert "secret" not in status.details
    assert "0badcafe" in status.details


def _header_bytes(status: grpc.Status) -> int:
    """Return the size of the header values of the response."""
    details = dict(status.trailing_metadata or ())["grpc-status-details-bin"]
    assert isinstance(details, bytes)
    return len(quote(status.details or "", safe=string.printable)) + len(base64.b64encode(details))


@pytest.mark.parametrize("text", ["u" * 20_000, "ü" * 20_000, "\0%" * 20_000, "\U0001f600" * 20_000])
def test_long_texts_are_shortened_so_that_the_headers_fit(text: str) -> None:
    status = status_of(NoMatchingPlatform(text, text, text), "0badcafe")
    message, info = _details(status)

    assert _header_bytes(status) < 8 * 1024
    assert message.message.endswith("[request 0badcafe]")
    assert info.reason == NoMatchingPlatform.reason
    assert "…" in message.message
    assert "…" in info.metadata["reference"]


def test_a_long_message_keeps_its_beginning_and_end() -> None:
    error = ImageNotPresent("u" * 20_000)

    message, _ = _details(status_of(error, "0badcafe"))

    assert message.message.endswith(f"{error.explain()[-60:]} [request 0badcafe]")
    assert message.message.startswith(error.explain()[:60])


def test_a_file_name_that_is_not_utf8_is_escaped() -> None:
    message, info = _details(status_of(ImageNotPresent("a\udcffb"), "0badcafe"))

    assert "a\\udcffb" in message.message
    assert info.metadata["image"] == "a\\udcffb"


CLASSES = [
    one
    for _, one in inspect.getmembers(errors, inspect.isclass)
    if issubclass(one, GuestpullError) and one is not GuestpullError
]


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda one: one.__name__)
def test_every_error_has_a_code_and_a_unique_reason(error_class: type[GuestpullError]) -> None:
    assert grpc.StatusCode[error_class.status.value] is not grpc.StatusCode.OK
    assert [one.reason for one in CLASSES].count(error_class.reason) == 1
