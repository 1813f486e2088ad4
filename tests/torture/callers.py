"""Concurrent callers, which sometimes cancel their calls."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from guestpull_client import Client, PullPolicy
from guestpull_client.errors import GuestpullError
from guestpull_client.models import PulledImage
from support.namespaces import MountNamespace
from support.peers import run
from torture.promises import BundlePromise, Promises, State
from torture.world import KnownImage, World

_UNANSWERED: Final = frozenset(
    {"DEADLINE_EXCEEDED", "CANCELLED", "SERVICE_UNAVAILABLE", "UNAVAILABLE", "GIVEN_UP"}
)
"""Failures after which the call may still be running, or may have completed."""
_ALWAYS_POSSIBLE: Final = frozenset({*_UNANSWERED, "IMAGE_NOT_PRESENT", "TOO_MANY_PULLS"})


@dataclass
class Scene:
    """The state that the callers of one round share.

    Attributes:
        address: the daemon's address.
        world: the images.
        references: references with the image that each must resolve to; None if it moves.
        promises: what callers may rely on.
        possible: reasons with which a pull may fail in this round's weather.
    """

    address: str
    world: World
    references: tuple[tuple[str, KnownImage | None], ...]
    promises: Promises
    possible: frozenset[str]
    stop: threading.Event = field(default_factory=threading.Event)
    violations: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    _moments: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def moment(self) -> None:
        """Signal an event, at which the daemon may be killed."""
        self._moments.release()

    def await_moments(self, count: int, patience: float) -> None:
        """Wait for a number of events, with a time limit for each."""
        for _ in range(count):
            if not self._moments.acquire(timeout=patience):
                return


class Caller:
    """One caller, in a separate thread.

    Args:
        scene: the state of the round.
        choices: the source of its random choices.
        places: paths of bundles that only it uses.
        contested: path of a bundle that other callers use too.
    """

    def __init__(self, scene: Scene, choices: random.Random, places: list[str], contested: str) -> None:
        self._scene = scene
        self._choices = choices
        self._places = places
        self._contested = contested
        self._thread = threading.Thread(target=self._run)
        self._client: Client

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self) -> None:
        """Wait until its last call has ended."""
        self._thread.join(90)
        if self._thread.is_alive():
            self._scene.violations.append("a call did not end within 90 seconds")

    def _run(self) -> None:
        try:
            with Client(self._scene.address, timeout=60) as self._client:
                while not self._scene.stop.is_set():
                    self._act()
        except Exception as error:  # noqa: BLE001 - any exception is a finding
            self._scene.violations.append(f"a caller failed by {error!r}")

    def _act(self) -> None:
        place = self._choices.choice(self._places)
        promise = self._scene.promises.bundle(place)
        actions: tuple[Callable[[str, BundlePromise], None], ...]
        match promise.state:
            case State.READY:
                actions = (
                    self._release,
                    self._release,
                    self._write,
                    self._look,
                    self._pull_again,
                    self._run_container,
                    self._take_away,
                )
            case State.ABSENT | State.COMING:
                actions = (self._pull, self._pull, self._pull, self._pull_contested)
            case State.LEAVING:
                actions = (self._release,)
            case State.TAKEN:
                actions = (self._release_taken,)
        self._choices.choice((*actions, self._remove, self._list))(place, promise)

    # -- pulling --------------------------------------------------------------------------------------------

    def _pull(self, place: str, promise: BundlePromise) -> None:
        was_coming = promise.state is State.COMING
        reference, wanted = self._choices.choice(self._scene.references)
        removals = self._scene.promises.removals()
        promise.state = State.COMING
        try:
            pulled = self._pull_somehow(reference, place)
        except GuestpullError as error:
            possible = self._scene.possible | _ALWAYS_POSSIBLE | ({"BUNDLE_EXISTS"} if was_coming else set())
            self._failed("pull", error, possible)
            if error.reason not in _UNANSWERED | {"BUNDLE_EXISTS"} and not was_coming:
                promise.state = State.ABSENT
                if os.path.lexists(place):
                    self._violation(f"a pull that failed by {error.reason} left {place}")
            return
        if pulled is None:
            return
        self._scene.promises.pulled(pulled.image_id, removals)
        self._scene.outcomes["pulled"] += 1
        promise.state, promise.image_id, promise.written = State.READY, pulled.image_id, {}
        if wanted is not None and pulled.image_id != wanted.image.image_id:
            self._violation(f"{reference} gave {pulled.image_id}")
        self._look(place, promise)

    def _pull_somehow(self, reference: str, place: str) -> PulledImage | None:
        """Pull; return None if the call was cancelled."""
        choose = self._choices
        policy = choose.choice((PullPolicy.UNSPECIFIED, PullPolicy.UNSPECIFIED, *PullPolicy))
        timeout = choose.uniform(0.005, 0.7) if choose.random() < 0.15 else None
        self._scene.moment()
        if choose.random() < 0.5:
            return self._client.pull(reference, place, policy=policy, timeout=timeout)
        patience = choose.randint(0, 8) if choose.random() < 0.3 else 1_000_000
        events = self._client.pull_with_progress(reference, place, policy=policy, timeout=timeout)
        for number, event in enumerate(events):
            self._scene.moment()
            if isinstance(event, PulledImage):
                return event
            if number >= patience:
                self._scene.outcomes["given up"] += 1
                events.close()
                return None
        raise GuestpullError("the events ended without a result", "NO_RESULT")

    def _pull_contested(self, _place: str, _promise: BundlePromise) -> None:
        """Pull into a bundle that others use too, and release it immediately."""
        reference, _ = self._choices.choice(self._scene.references)
        possible = self._scene.possible | _ALWAYS_POSSIBLE | {"BUNDLE_EXISTS", "BUNDLE_NOT_FOUND"}
        try:
            self._pull_somehow(reference, self._contested)
            self._client.release_bundle(self._contested)
        except GuestpullError as error:
            self._failed("pull into a contested bundle", error, possible)

    def _pull_again(self, place: str, promise: BundlePromise) -> None:
        """Pull into a bundle that is ready; the daemon must refuse and leave it unchanged."""
        reference, _ = self._choices.choice(self._scene.references)
        try:
            self._client.pull(reference, place)
        except GuestpullError as error:
            self._failed("pull into a bundle", error, _ALWAYS_POSSIBLE | {"BUNDLE_EXISTS"})
            self._look(place, promise)
        else:
            self._violation(f"{place} was a bundle, and was pulled into")

    # -- releasing ------------------------------------------------------------------------------------------

    def _release(self, place: str, promise: BundlePromise) -> None:
        possible = _UNANSWERED | ({"BUNDLE_NOT_FOUND"} if promise.state is State.LEAVING else set())
        promise.state = State.LEAVING
        self._scene.moment()
        try:
            self._client.release_bundle(place)
        except GuestpullError as error:
            self._failed("release", error, possible)
            if error.reason != "BUNDLE_NOT_FOUND":
                return
        else:
            self._scene.outcomes["released"] += 1
        promise.state = State.ABSENT
        if os.path.lexists(place):
            self._violation(f"{place} was released, and is there")

    def _run_container(self, place: str, promise: BundlePromise) -> None:
        """Use a bundle in a new mount namespace, as runc does: no call may delete anything."""
        # at another path, as in runc: removing a directory unmounts the mounts on it in all namespaces
        script = f"mount --bind {place}/rootfs /mnt"
        with MountNamespace(Path(place), script) as container:
            if self._choices.random() < 0.3:
                self._take_away(place, promise)
            self._scene.moment()
            try:
                self._client.release_bundle(place)
            except GuestpullError as error:
                self._failed("release under a container", error, _UNANSWERED | {"BUNDLE_BUSY"})
            else:
                self._violation(f"{place} was released under its container")
            rootfs = Path(f"/proc/{container.pid}/root/mnt")
            for name, content in promise.written.items():
                if (rootfs / name).read_bytes() != content:
                    self._violation(f"{place}: its container does not find {name} as it was written")
            self._look_into(rootfs, promise)

    def _take_away(self, place: str, promise: BundlePromise) -> None:
        """Delete a bundle as kata-agent does, without a call."""
        promise.state = State.TAKEN
        self._scene.outcomes["taken away"] += 1
        run("umount", "--lazy", f"{place}/rootfs")
        shutil.rmtree(place)
        self._scene.moment()

    def _release_taken(self, place: str, promise: BundlePromise) -> None:
        """Release a bundle that was deleted, possibly while the daemon does the same."""
        try:
            self._client.release_bundle(place)
        except GuestpullError as error:
            self._failed("release of what was taken away", error, _UNANSWERED | {"BUNDLE_NOT_FOUND"})
            if error.reason != "BUNDLE_NOT_FOUND":
                return
        promise.state = State.ABSENT

    def _remove(self, _place: str, _promise: BundlePromise) -> None:
        reference, image = self._choices.choice(self._scene.references)
        if image is None:
            return
        name = reference if self._choices.random() < 0.3 else image.image.image_id
        force = self._choices.random() < 0.5
        possible = _UNANSWERED | {"IMAGE_NOT_PRESENT"} | (set() if force else {"IMAGE_IN_USE"})
        self._scene.moment()
        with self._scene.promises.removing(image.image.image_id):
            try:
                self._client.remove_image(name, force=force)
            except GuestpullError as error:
                self._failed("remove", error, possible)
            else:
                self._scene.outcomes["removed"] += 1

    # -- checking -------------------------------------------------------------------------------------------

    def _write(self, place: str, promise: BundlePromise) -> None:
        name, content = f"written-{len(promise.written)}", self._choices.randbytes(100)
        path = Path(place, "rootfs", name)
        try:
            path.write_bytes(content)
        except OSError as error:
            self._scene.outcomes[f"write: {error.strerror}"] += 1
            path.unlink(missing_ok=True)
        else:
            promise.written[name] = content

    def _look(self, place: str, promise: BundlePromise) -> None:
        self._look_into(Path(place, "rootfs"), promise)

    def _look_into(self, rootfs: Path, promise: BundlePromise) -> None:
        image = self._scene.world.image(promise.image_id)
        if image is None:
            self._violation(f"{rootfs} is image {promise.image_id}, which nobody made")
            return
        written = frozenset(os.fsencode(name) for name in promise.written)
        for one in image.violations(rootfs, besides=written):
            self._violation(one)

    def _list(self, place: str, promise: BundlePromise) -> None:
        try:
            self._client.images()
            self._client.layers()
            listed = {one.bundle_path: one for one in self._client.bundles()}
        except GuestpullError as error:
            self._failed("list", error, _UNANSWERED)
            return
        if promise.state is State.READY and (place not in listed or not listed[place].mounted):
            self._violation(f"{place} is ready, and is not listed as mounted")

    # -- reporting ------------------------------------------------------------------------------------------

    def _failed(self, doing: str, error: GuestpullError, possible: frozenset[str]) -> None:
        self._scene.moment()
        self._scene.outcomes[error.reason] += 1
        if error.reason not in possible:
            self._violation(f"{doing} failed by {error.reason}: {error.message}")
        if error.reason == "SERVICE_UNAVAILABLE":
            self._scene.stop.wait(0.05)

    def _violation(self, what: str) -> None:
        self._scene.violations.append(what)
