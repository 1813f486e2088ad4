"""The command line of `scripts/torture`."""

# ruff: noqa: T201 - prints to the user
from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from torture.campaign import Campaign, Violated


def main() -> int:
    """Run a campaign; return 1 if a check failed."""
    arguments = _arguments()
    print(
        f"torture: seed {arguments.seed}, {arguments.kills} kills or {arguments.minutes} minutes", flush=True
    )
    directory = Path(tempfile.mkdtemp(prefix="guestpull-torture-"))
    campaign = Campaign(arguments.seed, directory)
    try:
        with campaign:
            try:
                campaign.run(
                    kills=arguments.kills,
                    seconds=arguments.minutes * 60,
                    show=lambda report: print(f"torture: {report}", flush=True),
                )
            except Violated:
                _keep(campaign, arguments.keep)
                raise
    except Violated as violated:
        print(f"torture: {campaign.report}")
        for sentence in violated.args:
            print(f"torture: VIOLATED: {sentence}")
        print(
            f"torture: seed {arguments.seed}; the log and the work directory's files are in {arguments.keep}"
        )
        return 1
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"torture: {campaign.report}")
    print("torture: nothing was lost, and nothing was believed that is not true")
    return 0


def _keep(campaign: Campaign, directory: Path) -> None:
    """Keep the evidence of a failure."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shutil.copy(campaign.daemon.log, directory / "log")
    for path in campaign.daemon.work_dir.glob("*.json*"):
        shutil.copy(path, directory)
    daemon = campaign.daemon
    listing = [*daemon.work_dir.glob("*/*"), *daemon.disk.glob("bundles/*/*")]
    (directory / "listing").write_text("".join(f"{path}\n" for path in sorted(listing)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/torture",
        description="Kill a daemon repeatedly while it works, and check what must be true.",
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="maximum duration [1]")
    parser.add_argument("--kills", type=int, default=1_000_000, help="maximum number of kills [no limit]")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(1 << 32), help="seed of all choices [a random one]"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("/tmp/guestpull-torture-evidence"),
        help="for what tells of a failure",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
