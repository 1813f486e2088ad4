"""`guestpulld verify`: finds damage in a work directory and, with --repair, repairs it.

This implements the command; cli.py parses its options and prints the result.
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
    """The result of `verify`.

    Attributes:
        work_dir: the work directory.
        findings: damage that remains, and notes.
        repaired: layers that were downloaded again.
        restored: images whose entry in meta_store.json, or whose backup in images/, was corrected.
        not_repaired: why repairs failed, one sentence each.
        proved: the number of layers that match their images' ids. None without `deep`.
        unproved: the number of layers without known damage and without proof. None without `deep`.
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
        """Whether no damage is known to remain."""
        return all(finding.fault is Fault.NOTE for finding in self.findings) and not self.not_repaired

    def lines(self) -> Iterator[str]:
        """Render the result for people."""
        for digest in self.repaired:
            yield f"repaired: layer {digest} was downloaded again"
        for image_id in self.restored:
            yield f"repaired: the entry of image {image_id} was corrected"
        for failure in self.not_repaired:
            yield f"not repaired: {failure}"
        for finding in self.findings:
            yield f"{finding.fault.value}: {finding.sentence} {finding.remedy}"
        if self.is_sound and self.unproved:
            counts = f"{self.proved} layers are proved, {self.unproved} cannot be"
            yield f"no damage was found in {self.work_dir}; {counts}"
        elif self.is_sound:
            yield f"{self.work_dir} is sound"


def verify_work_dir(
    configuration: Configuration, *, guest_work_dir: str | None, deep: bool, repairs: bool, warn: Warn
) -> Verified:
    """Find damage in a work directory. With `repairs`, repair it, and check again.

    With `deep`, rebuild each layer's tar from its tar-split and its directory. Its digest must be the diff_id in
    the image's config, whose digest must be the image's id. Do not write anything if nothing must be repaired.

    Raises:
        InvalidStore: the directory does not exist.
        WorkDirInUse: a daemon serves the directory, and it must be repaired.
        StorageFailed: the operating system reported an error.
    """
    work_dir = configuration.work_dir
    guest_work_dir = guest_work_dir or likely_guest_work_dir(work_dir)

    def check() -> Verified:
        found = audit(work_dir, guest_work_dir)
        if not deep:
            return Verified(work_dir, found)
        proof = deep_audit(work_dir, guest_work_dir, configuration.limits)
        return Verified(work_dir, (*found, *proof.findings), proved=proof.proved, unproved=proof.unproved)

    verified = check()
    if not repairs or verified.is_sound:
        return verified
    restored = _restore_images(configuration, guest_work_dir, warn)
    repaired, failures = _repair(
        configuration, check().findings if restored else verified.findings, guest_work_dir
    )
    return dataclasses.replace(check(), repaired=repaired, restored=restored, not_repaired=failures)


def _restore_images(
    configuration: Configuration, guest_work_dir: str | None, warn: Warn
) -> tuple[Digest, ...]:
    with _opened(configuration, guest_work_dir) as puller:
        warn(puller.store.warnings)
        return puller.store.repair_images()


def _repair(
    configuration: Configuration, findings: Sequence[Finding], guest_work_dir: str | None
) -> tuple[tuple[Digest, ...], tuple[str, ...]]:
    damaged: dict[Digest, set[Digest | None]] = {}  # None means the image itself
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
                failures.append(f"{error.explain()} If image {name} was baked from a file, bake it again.")
            else:
                repaired |= dict.fromkeys(layer.compressed_digest for layer in done)
    return tuple(repaired), tuple(failures)


@contextmanager
def _opened(configuration: Configuration, guest_work_dir: str | None) -> Iterator[Puller]:
    """Open a work directory. If it is tidy (as baked), leave it tidy."""
    tidy = is_tidy(configuration.work_dir)
    puller = Puller.open(configuration, guest_work_dir=guest_work_dir)
    try:
        yield puller
    finally:
        puller.close(tidy=tidy)
