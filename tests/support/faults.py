"""The faults of a simulated registry; see simulator.py.

registry.fault(layer, Status(503), times=2)
registry.fault("manifests/1.0", SlowHeader(seconds=60))
registry.fault("token", Status(500))
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from support.simulator import Exchange, partial


def _share(after: float, length: int) -> int:
    return int(after * length)


# -- before the body ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """Send another status. `retry_after` is the value of that header."""

    code: int
    retry_after: str = ""

    def send(self, exchange: Exchange) -> None:
        exchange.answer.status = self.code
        exchange.answer.body = b"{}"
        if self.retry_after:
            exchange.answer.headers["Retry-After"] = self.retry_after
        exchange.send()


@dataclass(frozen=True)
class Refuse:
    """Close or reset the connection without a response."""

    reset: bool = False

    def send(self, exchange: Exchange) -> None:
        exchange.hang_up(reset=self.reset)


@dataclass(frozen=True)
class Nonsense:
    """Send something that is not HTTP."""

    def send(self, exchange: Exchange) -> None:
        exchange.write_raw(b"\0\1\2 this is no HTTP\r\n\r\n")
        exchange.hang_up()


@dataclass(frozen=True)
class SlowHeader:
    """Send the header byte by byte, evenly spread over `seconds`."""

    seconds: float

    def send(self, exchange: Exchange) -> None:
        header = b"".join(exchange.header_lines())
        for number in range(len(header)):
            exchange.write_raw(header[number : number + 1])
            if exchange.wait(self.seconds / len(header)):
                return
        exchange.write(exchange.answer.body)


@dataclass(frozen=True)
class Headers:
    """Add or replace headers."""

    headers: tuple[tuple[str, str], ...]

    def send(self, exchange: Exchange) -> None:
        exchange.answer.headers |= dict(self.headers)
        exchange.send()


@dataclass(frozen=True)
class Pause:
    """Send the response late."""

    seconds: float

    def send(self, exchange: Exchange) -> None:
        if not exchange.wait(self.seconds):
            exchange.send()


# -- redirects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RedirectTo:
    """Redirect to another host with the same path, or to a complete URL."""

    url: str
    code: int = 307

    def send(self, exchange: Exchange) -> None:
        exchange.answer.status = self.code
        exchange.answer.body = b""
        whole = self.url.count("/") > 2 or not self.url.startswith("http")
        exchange.answer.headers["Location"] = self.url if whole else self.url + exchange.request.path
        exchange.send()


@dataclass(frozen=True)
class RedirectLoop:
    """Redirect to the same URL."""

    def send(self, exchange: Exchange) -> None:
        RedirectTo(exchange.request.path).send(exchange)


# -- in the body -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Close or reset the connection after a share of the body."""

    after: float
    reset: bool = False

    def send(self, exchange: Exchange) -> None:
        body = exchange.answer.body
        exchange.send_header()
        exchange.write(body[: _share(self.after, len(body))])
        exchange.hang_up(reset=self.reset)


@dataclass(frozen=True)
class Stall:
    """Stop sending after a share of the body, and keep the connection open."""

    after: float

    def send(self, exchange: Exchange) -> None:
        body = exchange.answer.body
        exchange.send_header()
        exchange.write(body[: _share(self.after, len(body))])
        exchange.wait()


@dataclass(frozen=True)
class Drip:
    """After a share of the body, send it byte by byte, to its end or until an event."""

    after: float
    bytes_per_second: float
    until: threading.Event | None = None

    def send(self, exchange: Exchange) -> None:
        body = exchange.answer.body
        start = _share(self.after, len(body))
        exchange.send_header()
        exchange.write(body[:start])
        for number in range(start, len(body)):
            if self.until is not None and self.until.is_set():
                exchange.write(body[number:])
                return
            if exchange.wait(1 / self.bytes_per_second):
                return
            exchange.write(body[number : number + 1])


@dataclass(frozen=True)
class Corrupt:
    """Change the byte at a share of the body."""

    at: float = 0.5

    def send(self, exchange: Exchange) -> None:
        body = bytearray(exchange.answer.body)
        body[min(_share(self.at, len(body)), len(body) - 1)] ^= 0xFF
        exchange.answer.body = bytes(body)
        exchange.send()


@dataclass(frozen=True)
class Instead:
    """Send another body."""

    body: bytes

    def send(self, exchange: Exchange) -> None:
        exchange.answer.body = self.body
        exchange.send()


@dataclass(frozen=True)
class WrongLength:
    """Send a Content-Length that is wrong by this number of bytes."""

    by: int

    def send(self, exchange: Exchange) -> None:
        exchange.send_header(length=len(exchange.answer.body) + self.by)
        exchange.write(exchange.answer.body)
        exchange.hang_up()


@dataclass(frozen=True)
class NoLength:
    """Send the body in chunks, without a Content-Length."""

    more: bytes = b""

    def send(self, exchange: Exchange) -> None:
        exchange.answer.headers["Transfer-Encoding"] = "chunked"
        exchange.send_header(length=None)
        for piece in (exchange.answer.body, self.more):
            if piece:
                exchange.write_raw(f"{len(piece):x}\r\n".encode())
                exchange.write(piece)
                exchange.write_raw(b"\r\n")
        exchange.write_raw(b"0\r\n\r\n")


def _chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""  # an empty chunk would end the body


@dataclass(frozen=True)
class EndlessTrailers:
    """Send the body in one chunk, then trailer fields without end, one every `seconds`."""

    seconds: float

    def send(self, exchange: Exchange) -> None:
        exchange.answer.headers["Transfer-Encoding"] = "chunked"
        exchange.send_header(length=None)
        exchange.write_raw(_chunk(exchange.answer.body) + b"0\r\n")
        while not exchange.wait(self.seconds):
            exchange.write_raw(b"X-A: b\r\n")


@dataclass(frozen=True)
class EndlessChunkHeader:
    """After a share of the body, send a chunk extension byte by byte, without end."""

    after: float
    seconds: float

    def send(self, exchange: Exchange) -> None:
        body = exchange.answer.body
        exchange.answer.headers["Transfer-Encoding"] = "chunked"
        exchange.send_header(length=None)
        exchange.write_raw(_chunk(body[: _share(self.after, len(body))]) + b"1;")
        while not exchange.wait(self.seconds):
            exchange.write_raw(b"x")


@dataclass(frozen=True)
class Endless:
    """Send a body without end."""

    def send(self, exchange: Exchange) -> None:
        exchange.send_header(length=None)
        exchange.write(exchange.answer.body)
        while not exchange.wait(0):
            exchange.write(bytes(64 * 1024))


# -- ranges ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IgnoreRange:
    """Send the whole blob, regardless of the requested range."""

    def send(self, exchange: Exchange) -> None:
        answer = exchange.answer
        answer.status, answer.body, answer.headers = 200, answer.whole, {}
        exchange.send()


@dataclass(frozen=True)
class OtherRange:
    """Send a range that starts at a share of the blob instead of the requested offset."""

    at: float

    def send(self, exchange: Exchange) -> None:
        whole = exchange.answer.whole
        exchange.answer = partial(whole, _share(self.at, len(whole)))
        exchange.send()
