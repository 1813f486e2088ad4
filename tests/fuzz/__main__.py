"""The command line of `scripts/fuzz`."""

# ruff: noqa: T201 - prints to the user
from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

from fuzz.campaign import Campaign, Failure
from fuzz.targets import TARGETS, Target


def main() -> int:
    """Run a campaign, or one input again; return 1 if an input failed."""
    arguments = _arguments()
    campaign = Campaign(arguments.seed, arguments.keep)
    if arguments.reproduce is not None:
        (target,) = _chosen(arguments.targets)
        campaign.try_input(target, arguments.reproduce.read_bytes(), 0)
    else:
        targets = [
            target for target in _chosen(arguments.targets) if not target.needs_root or os.geteuid() == 0
        ]
        print(
            f"fuzz: seed {arguments.seed}, {arguments.minutes} minutes: {', '.join(one.name for one in targets)}"
        )
        campaign.run(targets, arguments.minutes * 60)
        for name, count in campaign.inputs.items():
            print(f"fuzz: {name}: {count} inputs")
    for failure in campaign.failures:
        _tell(failure)
    print(f"fuzz: {len(campaign.failures)} failures")
    return 1 if campaign.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description="Feed damaged inputs to all parsers of untrusted data."
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="duration [1]")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="seed of all inputs [a random one]"
    )
    parser.add_argument(
        "--keep", type=Path, default=Path("/tmp/guestpull-fuzz"), help="directory for reproducers"
    )
    parser.add_argument(
        "--reproduce", type=Path, metavar="FILE", help="run only this input, on the given TARGET"
    )
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help=f"of: {', '.join(one.name for one in TARGETS)}; all if none",
    )
    return parser.parse_args()


def _chosen(names: list[str]) -> list[Target]:
    by_name = {target.name: target for target in TARGETS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        sys.exit(f"fuzz: no target {unknown[0]}; there are {', '.join(by_name)}")
    return [by_name[name] for name in names] or list(TARGETS)


def _tell(failure: Failure) -> None:
    print(f"fuzz: {failure.target} failed at input {failure.number}; {failure.reproducer} has it:")
    print(failure.trace)
    print(f"    scripts/fuzz --reproduce {failure.reproducer} {failure.target}")


if __name__ == "__main__":
    sys.exit(main())
