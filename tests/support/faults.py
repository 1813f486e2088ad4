"""What can go wrong at a registry, by name; see simulator.py.

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
    """Another status. `retry_after` is the header's text."""

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
    """The connection is closed without an answer, or reset."""

    reset: bool = False

    def send(self, exchange: Exchange) -> None:
        exchange.hang_up(reset=self.reset)


@dataclass(frozen=True)
class Nonsense:
    """What comes is no HTTP."""

    def send(self, exchange: Exchange) -> None:
        exchange.write_raw(b"\0\1\2 this is no HTTP\r\n\r\n")
        exchange.hang_up()


@dataclass(frozen=True)
class SlowHeader:
    """The header comes byte by byte, each soon enough, all of them within so many seconds."""

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
    """Other headers, or the same with other values."""

    headers: tuple[tuple[str, str], ...]

    def send(self, exchange: Exchange) -> None:
        exchange.answer.headers |= dict(self.headers)
        exchange.send()


@dataclass(frozen=True)
class Pause:
    """The answer comes, but late."""

    seconds: float

    def send(self, exchange: Exchange) -> None:
        if not exchange.wait(self.seconds):
            exchange.send()


# -- redirects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RedirectTo:
    """A redirect to the same path elsewhere. `url` is of another host, or all of an URL."""

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
    """A redirect to itself."""

    def send(self, exchange: Exchange) -> None:
        RedirectTo(exchange.request.path).send(exchange)


# -- in the body -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """The connection ends after a share of the body, orderly or by a reset."""

    after: float
    reset: bool = False

    def send(self, exchange: Exchange) -> None:
        body = exchange.answer.body
        exchange.send_header()
        exchange.write(body[: _share(self.after, len(body))])
        exchange.hang_up(reset=self.reset)


@dataclass(frozen=True)
class Stall:
    """After a share of the body nothing comes any more, and the connection stays."""

    after: float

    def send(self, exchange: Exchange) -> None:
        body = exchange.answer.body
        exchange.send_header()
        exchange.write(body[: _share(self.after, len(body))])
        exchange.wait()


@dataclass(frozen=True)
class Drip:
    """After a share of the body, it comes byte by byte, to its end or until something has happened."""

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
    """One byte is another one: that at a share of the body."""

    at: float = 0.5

    def send(self, exchange: Exchange) -> None:
        body = bytearray(exchange.answer.body)
        body[min(_share(self.at, len(body)), len(body) - 1)] ^= 0xFF
        exchange.answer.body = bytes(body)
        exchange.send()


@dataclass(frozen=True)
class Instead:
    """Another body."""

    body: bytes

    def send(self, exchange: Exchange) -> None:
        exchange.answer.body = self.body
        exchange.send()


@dataclass(frozen=True)
class WrongLength:
    """A Content-Length that is off by so many bytes."""

    by: int

    def send(self, exchange: Exchange) -> None:
        exchange.send_header(length=len(exchange.answer.body) + self.by)
        exchange.write(exchange.answer.body)
        exchange.hang_up()


@dataclass(frozen=True)
class NoLength:
    """The body in chunks, of which nobody knows how many come."""

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
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""  # an empty one would be the last


@dataclass(frozen=True)
class EndlessTrailers:
    """All of the body in a chunk, and trailer fields behind it without end, one in so many seconds."""

    seconds: float

    def send(self, exchange: Exchange) -> None:
        exchange.answer.headers["Transfer-Encoding"] = "chunked"
        exchange.send_header(length=None)
        exchange.write_raw(_chunk(exchange.answer.body) + b"0\r\n")
        while not exchange.wait(self.seconds):
            exchange.write_raw(b"X-A: b\r\n")


@dataclass(frozen=True)
class EndlessChunkHeader:
    """After a share of the body, the extension of a chunk's length, byte by byte without end."""

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
    """A body that never ends."""

    def send(self, exchange: Exchange) -> None:
        exchange.send_header(length=None)
        exchange.write(exchange.answer.body)
        while not exchange.wait(0):
            exchange.write(bytes(64 * 1024))


# -- ranges ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IgnoreRange:
    """The whole blob, whatever part was asked for."""

    def send(self, exchange: Exchange) -> None:
        answer = exchange.answer
        answer.status, answer.body, answer.headers = 200, answer.whole, {}
        exchange.send()


@dataclass(frozen=True)
class OtherRange:
    """A part that begins elsewhere than was asked for: at a share of the blob."""

    at: float

    def send(self, exchange: Exchange) -> None:
        whole = exchange.answer.whole
        exchange.answer = partial(whole, _share(self.at, len(whole)))
        exchange.send()
