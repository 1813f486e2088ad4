"""`guestpulld verify`: finds what is wrong in a work directory and, with --repair, repairs it.

This is the command without its options and its output. Its result can render itself as lines for people.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from guestpull_server.config import Configuration
from guestpull_server.errors import GuestpullError, NotAtRegistry
from guestpull_server.models import Digest
from guestpull_server.puller import Puller
from guestpull_server.store import Fault, Finding, audit, likely_guest_work_dir
from guestpull_server.upkeep.deep_audit import deep_audit
from guestpull_server.upkeep.repair import repair
from guestpull_server.upkeep.work_dirs import Warn, is_tidy


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found, and what it repaired of that.

    Attributes:
        work_dir: where it looked.
        findings: what is wrong now, or worth a note.
        repaired: layers that were downloaded again.
        restored: images of which meta_store.json, or the copy in images/, was put right.
        not_repaired: what kept it from repairing; a sentence each.
        proved: layers that are what their images' ids say; None: nothing was to be proved.
        unproved: layers that nothing is known to be wrong with, and nothing proves; likewise.
    """

    work_dir: str
    findings: tuple[Finding, ...]
    repaired: tuple[Digest, ...] = ()
    restored: tuple[Digest, ...] = ()
    not_repaired: tuple[str, ...] = ()
    proved: int | None = None
    unproved: int | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong (any more), as far as can be told."""
        return all(finding.fault is Fault.NOTE for finding in self.findings) and not self.not_repaired

    def lines(self) -> Iterator[str]:
        """For people."""
        for digest in self.repaired:
            yield f"repaired: layer {digest} was downloaded again"
        for image_id in self.restored:
            yield f"repaired: what is written of image {image_id} was put right"
        for failure in self.not_repaired:
            yield f"not repaired: {failure}"
        for finding in self.findings:
            yield f"{finding.fault.value}: {finding.sentence} {finding.remedy}"
        if self.is_sound and self.unproved:
            counts = f"{self.proved} layers are proved, {self.unproved} cannot be"
            yield f"nothing wrong was found in {self.work_dir}; {counts}"
        elif self.is_sound:
            yield f"{self.work_dir} is sound"


def verify_work_dir(
    configuration: Configuration, *, guest_work_dir: str | None, deep: bool, repairs: bool, warn: Warn
) -> Verified:
    """Look for what is wrong in a work directory; with `repairs`, repair what can be, and look again.

    With `deep`, each layer's tar is put together again from its record and its directory, and must have the
    digest that the image's config has for it, which the image's id proves. Where nothing is to be repaired,
    nothing is written.

    Raises:
        InvalidStore: there is no such directory.
        WorkDirInUse: a daemon serves it, and it was to be repaired.
        StorageFailed: the operating system refuses.
    """
    work_dir = configuration.work_dir
    guest_work_dir = guest_work_dir or likely_guest_work_dir(work_dir)

    def look() -> Verified:
        found = audit(work_dir, guest_work_dir)
        if not deep:
            return Verified(work_dir, found)
        proof = deep_audit(work_dir, guest_work_dir, configuration.limits)
        return Verified(work_dir, (*found, *proof.findings), proved=proof.proved, unproved=proof.unproved)

    seen = look()
    if not repairs or seen.is_sound:
        return seen
    restored = _mend(configuration, guest_work_dir, warn)
    repaired, failures = _repair(
        configuration, look().findings if restored else seen.findings, guest_work_dir
    )
    return dataclasses.replace(look(), repaired=repaired, restored=restored, not_repaired=failures)


def _mend(configuration: Configuration, guest_work_dir: str | None, warn: Warn) -> tuple[Digest, ...]:
    with _opened(configuration, guest_work_dir) as puller:
        warn(puller.store.warnings)
        return puller.store.repair_images()


def _repair(
    configuration: Configuration, findings: Sequence[Finding], guest_work_dir: str | None
) -> tuple[tuple[Digest, ...], tuple[str, ...]]:
    damaged: dict[Digest, set[Digest | None]] = {}  # None: the image itself
    for finding in findings:
        for image_id in finding.images:
            damaged.setdefault(image_id, set()).add(finding.layer)
    repaired: dict[Digest, None] = {}
    failures: list[str] = []
    with _opened(configuration, guest_work_dir) as puller:
        for image in puller.store.images():
            wanted = damaged.get(image.image_id, set()) - repaired.keys()
            if not wanted or image.read_only_store:
                continue
            try:
                done = repair(puller, image, sorted(layer for layer in wanted if layer is not None))
            except NotAtRegistry as error:
                failures.append(error.explain())
            except GuestpullError as error:
                name = next(iter(image.references), image.image_id)
                failures.append(f"{error.explain()} If image {name} was baked from a file: bake it again.")
            else:
                repaired |= dict.fromkeys(layer.compressed_digest for layer in done)
    return tuple(repaired), tuple(failures)


@contextmanager
def _opened(configuration: Configuration, guest_work_dir: str | None) -> Iterator[Puller]:
    """Take a work directory over; one that was baked, and is tidy, is tidy again after it."""
    tidy = is_tidy(configuration.work_dir)
    puller = Puller.open(configuration, guest_work_dir=guest_work_dir)
    try:
        yield puller
    finally:
        puller.close(tidy=tidy)
