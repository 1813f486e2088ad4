"""Rounds of torture: start callers, kill the daemon, check, restart, check, and sometimes clean up.

with Campaign(seed=7, directory=Path("/tmp/torture")) as campaign:
    campaign.run(kills=100, seconds=300)
    print(campaign.report)
"""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from guestpull_client.errors import GuestpullError
from support.daemon import Daemon, Tmpfs
from support.simulator import RegistrySimulator
from torture import inspection
from torture.callers import Caller, Scene
from torture.promises import Promises, State
from torture.weather import PATIENCE, Weather
from torture.world import KnownImage, World, make_world

_DISK_BYTES: Final = 256 * 1024 * 1024
_CLEAN_EVERY: Final = 10  # rounds
_VERIFY_EVERY: Final = 4  # rounds
_MOST_CALLERS: Final = 6
_REPORT_EVERY: Final = 20.0  # seconds


class Violated(Exception):
    """A check failed. The arguments say what is wrong, a sentence each."""


@dataclass
class Report:
    """Statistics of a campaign.

    Attributes:
        rounds: number of rounds.
        kills: number of kills of the daemon by SIGKILL.
        kills_at_work: kills that left unfinished work behind.
        kills_at_start: kills before the daemon served.
        workers_killed: layer workers and fork servers killed while the daemon ran.
        ends: number of SIGTERMs to the daemon.
        damages: number of times that its files were damaged while it did not run.
        outcomes: number of calls by their result.
    """

    rounds: int = 0
    kills: int = 0
    kills_at_work: int = 0
    kills_at_start: int = 0
    workers_killed: int = 0
    ends: int = 0
    damages: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        calls = ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common())
        return (
            f"{self.rounds} rounds, {self.kills} kills of the daemon "
            f"({self.kills_at_work} left something half-done, {self.kills_at_start} came before it served), "
            f"{self.workers_killed} of workers, {self.ends} SIGTERMs, {self.damages} damages; calls: {calls}"
        )


class Campaign:
    """Images, a registry, a disk, a daemon, and rounds of torture, as a context manager.

    Args:
        seed: seed of all random choices.
        directory: holds all files; disks are mounted below it.
    """

    def __init__(self, seed: int, directory: Path) -> None:
        self.report = Report()
        self._seed = seed
        self._choices = random.Random(seed)
        self._directory = directory
        self._stack = ExitStack()
        self._promises = Promises()
        self._world: World = make_world(self._choices)
        self._references: tuple[tuple[str, KnownImage | None], ...] = ()
        self._registry: RegistrySimulator
        self._disk: Path
        self._daemon: Daemon
        self._log_read = 0
        self._damaged = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._registry = stack.enter_context(RegistrySimulator())
            named: list[tuple[str, KnownImage | None]] = [
                (self._registry.push(f"image{number}:1", one.image), one)
                for number, one in enumerate(self._world.images)
            ]
            named += [
                (f"{name.rpartition(':')[0]}@{one.image.digest}", one)
                for name, one in named[:3]
                if one is not None
            ]
            self._references = (*named, (self._move_tag(), None))
            self._disk = stack.enter_context(Tmpfs(self._directory / "disk", f"{_DISK_BYTES}"))
            configuration = {"limits": PATIENCE | {"max_concurrent_pulls": 4}}
            rest = stack.enter_context(Tmpfs(self._directory / "rest"))
            daemon = Daemon(rest, work_dir=self._disk / "work", configuration=configuration)
            self._daemon = stack.enter_context(daemon)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(error_type, error, trace)

    def run(self, *, kills: int, seconds: float, show: Callable[[Report], None] | None = None) -> None:
        """Run rounds until the daemon was killed often enough, or the time is over after a kill; then clean up.

        Args:
            kills: maximum number of kills.
            seconds: maximum duration; longer if there was no kill yet.
            show: called regularly with the report.

        Raises:
            Violated: a check failed; the disk is left as it was then.
        """
        try:
            self._run(kills, seconds, show)
        except Violated as violated:
            violated.add_note(f"seed {self._seed}, round {self.report.rounds}")
            raise

    def _run(self, kills: int, seconds: float, show: Callable[[Report], None] | None) -> None:
        end = time.monotonic() + seconds
        next_report = time.monotonic() + _REPORT_EVERY
        while self.report.kills < kills and (time.monotonic() < end or self.report.kills == 0):
            self._round()
            if self.report.rounds % _CLEAN_EVERY == 0:
                self._clean()
            if show is not None and time.monotonic() > next_report:
                next_report += _REPORT_EVERY
                show(self.report)
        self._clean()

    @property
    def daemon(self) -> Daemon:
        """The daemon, for tests that inject a fault."""
        return self._daemon

    def look(self) -> None:
        """Check a daemon without callers.

        Raises:
            Violated: a check failed.
        """
        self._demand(inspection.after_start(self._daemon, self._world, self._promises))

    # -- a round --------------------------------------------------------------------------------------------

    def _round(self) -> None:
        self.report.rounds += 1
        choose = self._choices
        if choose.random() < 0.3:
            self._move_tag()
        weather = Weather(choose, self._registry, self._world, self._daemon, self._disk, _DISK_BYTES)
        weather.begin()
        scene = Scene(
            self._daemon.client.address, self._world, self._references, self._promises, weather.possible
        )
        callers = [self._caller(scene, number) for number in range(choose.randint(1, _MOST_CALLERS))]
        for caller in callers:
            caller.start()
        scene.await_moments(choose.choice((1, 5, 20, 60, 120)), 2.0)
        threading.Event().wait(choose.uniform(0.0, 0.03))
        runs = self._interrupt(scene)
        scene.stop.set()
        for caller in callers:
            caller.join()
        weather.end()
        self.report.workers_killed += weather.workers_killed
        self.report.outcomes += scene.outcomes
        self._demand(scene.violations)
        if not runs:
            self._start_again()
        self._settle()
        self.look()
        if self.report.rounds % _VERIFY_EVERY == 0 and not self._damaged:
            self._demand(inspection.verified(self._daemon))
        self._check_log()
        self._pull_in_fair_weather()

    def _caller(self, scene: Scene, number: int) -> Caller:
        places = [str(self._daemon.bundle(f"{number}-{place}")) for place in range(3)]
        contested = str(self._daemon.bundle("contested"))
        self._promises.contested.add(contested)
        return Caller(scene, random.Random(self._choices.random()), places, contested)

    def _interrupt(self, scene: Scene) -> bool:
        """Kill or stop the daemon, or not; return whether it still runs."""
        kind = self._choices.choices(("kill", "SIGTERM", "nothing"), (80, 8, 12))[0]
        match kind:
            case "kill":
                self._daemon.kill()
                self.report.kills += 1
                self.report.kills_at_work += bool(self._half_done())
            case "SIGTERM":
                scene.stop.set()  # a caller may need some time to notice that the daemon is gone
                if self._daemon.stop() != 0:
                    raise Violated("the daemon did not end well")
                self.report.ends += 1
        return kind == "nothing"

    def _start_again(self) -> None:
        """Check the files, perhaps damage them, and start the daemon; sometimes kill it before it serves."""
        self._demand(inspection.remains(self._daemon.work_dir, self._world))
        damaged = self._damage() if self._choices.random() < 0.08 else None
        while self._choices.random() < 0.2:
            self._daemon.launch()
            threading.Event().wait(self._choices.uniform(0.0, 1.5))
            self._daemon.kill()
            self.report.kills += 1
            self.report.kills_at_start += 1
            # it may have been killed before it read the damaged file
            if self._meta_store() == damaged:
                continue
            self._demand(inspection.remains(self._daemon.work_dir, self._world))
        self._daemon.start()

    def _damage(self) -> bytes | None:
        """Damage the work directory; return the previous meta_store.json if that was damaged."""
        self.report.damages += 1
        self._damaged = True
        work_dir = self._daemon.work_dir
        if self._choices.random() < 0.5:
            meta_store = work_dir / "meta_store.json"
            if meta_store.exists():
                content = meta_store.read_bytes()
                meta_store.write_bytes(content[: self._choices.randrange(len(content))])
                self._promises.withdraw_images()
                return self._meta_store()
        elif all(one.state is State.ABSENT for one in self._promises.bundles.values()):
            # do not remove layers that are mounted
            there = sorted((work_dir / "layers").iterdir())
            for one in self._choices.sample(there, self._choices.randint(0, len(there))):
                shutil.rmtree(one)
        return None

    def _meta_store(self) -> bytes | None:
        try:
            return (self._daemon.work_dir / "meta_store.json").read_bytes()
        except FileNotFoundError:
            return None

    def _half_done(self) -> list[str]:
        """The leftovers of a killed daemon."""
        work_dir = self._daemon.work_dir
        return [
            *os.listdir(work_dir / "staging"),
            *map(str, work_dir.glob("overlay/*/bundle.json.preparing")),
            *map(str, work_dir.glob("*.tmp*")),
        ]

    # -- afterwards -----------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Wait until the daemon has ended cancelled calls, and released deleted bundles."""
        deadline = time.monotonic() + 30
        while left := [*self._taken_away(), *self._half_done()]:
            if time.monotonic() > deadline:
                raise Violated("what was given up or taken away never ends", *left)
            time.sleep(0.005)

    def _taken_away(self) -> list[str]:
        """Listed bundles without a rootfs: deleted by callers, or left by interrupted releases."""
        listed = self._daemon.client.bundles()
        return [one.bundle_path for one in listed if not os.path.isdir(f"{one.bundle_path}/rootfs")]

    def _pull_in_fair_weather(self) -> None:
        """Check that the next pull works."""
        place = self._daemon.bundle("check")
        reference, image = self._choices.choice(self._references)
        try:
            pulled = self._daemon.client.pull(reference, str(place))
            known = image or self._world.image(pulled.image_id)
            assert known is not None
            self.report.outcomes["pulled"] += 1
            self._demand(known.violations(place / "rootfs"))
            self._daemon.client.release_bundle(str(place))
        except GuestpullError as error:
            raise Violated(f"in fair weather {reference} fails by {error.reason}: {error.message}") from None
        self._promises.bundle(str(place))

    def _clean(self) -> None:
        """Release and remove everything, and check that nothing is left."""
        client = self._daemon.client
        try:
            for bundle in client.bundles():
                client.release_bundle(bundle.bundle_path)
                self._promises.bundle(bundle.bundle_path).state = State.ABSENT
            for image in client.images():
                with self._promises.removing(image.id):
                    client.remove_image(image.id)
        except GuestpullError as error:
            raise Violated(f"cleaning up fails by {error.reason}: {error.message}") from None
        self._daemon.stop()
        wrong = inspection.after_cleaning(self._daemon)
        self._check_log()
        for aside in self._daemon.work_dir.glob("meta_store.json.corrupt-*"):
            aside.unlink()
        self._damaged = False
        self._daemon.start()
        self._demand(wrong)

    def _check_log(self) -> None:
        text = self._daemon.log.read_text(errors="replace")[self._log_read :]
        self._log_read += len(text)
        if "Traceback" in text or " critical " in text:
            raise Violated("the log has a traceback", text[-3000:])

    def _move_tag(self) -> str:
        return self._registry.push("moving:1", self._choices.choice(self._world.images).image)

    @staticmethod
    def _demand(violations: list[str]) -> None:
        if violations:
            raise Violated(*violations[:40])
