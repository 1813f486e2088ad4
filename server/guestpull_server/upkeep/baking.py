"""`guestpulld bake`: brings images into a work directory ahead of time, so that a guest downloads nothing.

This is the command without its options and its output. Its result can render itself as lines for people.
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
    """An image that is in the store now."""

    reference: str
    image_id: Digest
    manifest_digest: Digest
    layers: int
    new_layers: int
    downloaded_bytes: int


@dataclass(frozen=True, slots=True)
class Baked:
    """What `bake` did."""

    work_dir: str
    images: tuple[BakedImage, ...]
    removed: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """For people."""
        for name in self.removed:
            yield f"removed {name}"
        for image in self.images:
            yield (
                f"baked {image.reference}: image {image.image_id}, {image.layers} layers, {image.new_layers} new, "
                f"{image.downloaded_bytes / 1e6:.1f} MB read"
            )


def read_list(path: str) -> list[tuple[str, str]]:
    """The sources that a file lists: `SOURCE [REFERENCE]` in each line; a word that begins with `#`, a comment.

    Raises:
        InvalidRequest: the file cannot be read, or a line has more than that.
    """
    wanted: list[tuple[str, str]] = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            "--file", f"{path}: {error}", "Name a text file with a source in each line."
        ) from None
    for number, line in enumerate(lines, 1):
        words = list(takewhile(lambda word: not word.startswith("#"), line.split()))
        if len(words) > 2:
            raise InvalidRequest(
                f"{path}, line {number}", "it has more than a source and a reference", "Fix it."
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
    """Have images in a work directory; the same input gives the same bytes, in whatever order and time.

    Of an image that comes in two forms (compressed otherwise), the later one is kept.

    Args:
        configuration: names the work directory.
        wanted: sources, each with the reference that it is to have, or an empty one.
        removed: images that are taken out first, by id or reference.
        guest_work_dir: where the guest will see the work directory; None: where its entries say that it is.
        platform: os/architecture[/variant]; empty: the host's.
        layer_names: how new layers' directories are named; None: as those that are there, or by digest.
        auth: user:password for registries; empty: none.
        warn: called with what was found in the store when it was opened; a sentence each.

    Raises:
        GuestpullError: the first image that cannot be had; those before it are in the store.
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
    told = guest_work_dirs(work_dir)
    if len(told) > 1:
        problem = f"the layers of {work_dir} are written down as layers of {' and of '.join(told)}"
        raise InvalidRequest("--guest-work-dir", problem, "Say where the guest will see them: all will be.")
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
