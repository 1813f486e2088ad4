"""`guestpulld bake`: brings images into a work directory, so that a guest need not download them.

This implements the command; cli.py parses its options and prints the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from guestpull_server.config import Configuration, LayerNames
from guestpull_server.errors import InvalidRequest
from guestpull_server.models import Credentials, Digest
from guestpull_server.platforms import Platform
from guestpull_server.pull import ImageRequest, Purpose
from guestpull_server.puller import Puller
from guestpull_server.registry import Reference
from guestpull_server.store import guest_work_dirs, likely_guest_work_dir


@dataclass(frozen=True, slots=True)
class BakedImage:
    """An image that was baked."""

    reference: str
    image_id: Digest
    manifest_digest: Digest
    layers: int
    new_layers: int
    downloaded_bytes: int


@dataclass(frozen=True, slots=True)
class Baked:
    """The result of `bake`."""

    work_dir: str
    images: tuple[BakedImage, ...]
    removed: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Render the result for people."""
        for name in self.removed:
            yield f"removed {name}"
        for image in self.images:
            yield (
                f"baked {image.reference}: image {image.image_id}, {image.layers} layers, {image.new_layers} new, "
                f"{image.downloaded_bytes / 1e6:.1f} MB read"
            )


def read_list(path: str) -> list[tuple[str, str]]:
    """Read sources from a file: one `SOURCE [REFERENCE]` a line. A word that begins with `#` starts a comment.

    Raises:
        InvalidRequest: the file cannot be read, or a line has more than two words.
    """
    wanted: list[tuple[str, str]] = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            "--file", f"{path}: {error}", "Give a text file with one source a line."
        ) from None
    for number, line in enumerate(lines, 1):
        words = list(takewhile(lambda word: not word.startswith("#"), line.split()))
        if len(words) > 2:
            raise InvalidRequest(
                f"{path}, line {number}", "more than a source and a reference", "Fix the line."
            )
        if words:
            wanted.append((words[0], words[1] if len(words) == 2 else ""))
    return wanted


def bake_images(
    configuration: Configuration,
    wanted: Iterable[tuple[str, str]],
    *,
    removed: Sequence[str],
    guest_work_dir: str | None,
    platform: str,
    layer_names: LayerNames | None,
    auth: str,
    warn: Callable[[Iterable[str]], object],
) -> Baked:
    """Bring images into a work directory. The same input produces the same bytes, in any order and at any time.

    If an image occurs with two compressions, the later one is kept.

    Args:
        configuration: names the work directory, and has all other settings.
        wanted: pairs of a source and the reference to store its image under, which may be empty.
        removed: ids or references of images to remove first.
        guest_work_dir: path of the work directory in the guest. None means the path in the existing entries.
        platform: os/architecture[/variant]. Empty means the host's.
        layer_names: how to name new layers' directories. None means like the existing ones, or else by digest.
        auth: user:password for registries. Empty means anonymous.
        warn: called with the store's warnings.

    Raises:
        GuestpullError: an image cannot be baked. Those before it are in the store.
    """
    credentials = Credentials.parse(auth, "--auth")
    for_platform = Platform.parse(platform) if platform else None
    guest_work_dir = guest_work_dir or _guest_work_dir(configuration.work_dir)
    puller = Puller.open(configuration, guest_work_dir=guest_work_dir, layer_names=layer_names)
    try:
        warn(puller.store.warnings)
        for text in removed:
            _remove(puller, text)
        images = tuple(_bake(puller, source, name, credentials, for_platform) for source, name in wanted)
    finally:
        puller.close(tidy=True)
    return Baked(configuration.work_dir, images, tuple(removed))


def _guest_work_dir(work_dir: str) -> str | None:
    guest_paths = guest_work_dirs(work_dir)
    if len(guest_paths) > 1:
        problem = f"the entries of {work_dir} name several work directories: {' and '.join(guest_paths)}"
        raise InvalidRequest("--guest-work-dir", problem, "Give this option: all entries will use its path.")
    return likely_guest_work_dir(work_dir)


def _bake(
    puller: Puller, source: str, name: str, credentials: Credentials | None, platform: Platform | None
) -> BakedImage:
    request = ImageRequest(
        source,
        credentials,
        platform=platform,
        purpose=Purpose.BAKE,
        name=str(Reference.parse(name)) if name else "",
    )
    pulled = puller.fetch(request)
    new = {layer.compressed_digest for layer in pulled.layers if not layer.reused}
    return BakedImage(
        pulled.reference,
        pulled.image_id,
        pulled.manifest_digest,
        len(pulled.layers),
        len(new),
        pulled.downloaded_bytes,
    )


def _remove(puller: Puller, text: str) -> None:
    name = Reference.in_full(text)
    puller.store.remove_image(puller.store.find_image(text, name), name, force=False)
