"""The command behind `scripts/demo`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from demo import guest, story
from demo.images import make_images
from demo.stage import DemoFailed, Stage, tmpfs


def _run(which: str) -> None:
    kept = Path(os.environ.get("GUESTPULL_DEMO_DIR") or "~/.cache/guestpull-demo").expanduser().absolute()
    kept.mkdir(parents=True, exist_ok=True)
    layout = make_images(kept, _say)
    with tmpfs(story.DIRECTORY) as directory:
        programs = Path(sys.executable).parent
        variables = {
            "PATH": f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "GUESTPULL_ADDRESS": f"unix://{directory}/guestpull.sock",
        }
        os.environ["PATH"] = variables["PATH"]
        with contextlib.closing(Stage(directory, variables)) as stage:
            if which == "bake":
                guest.tell(stage, layout, kept)
            else:
                story.tell(stage, layout)


def _say(text: str) -> None:
    sys.stdout.write(f"demo: {text}\n")
    sys.stdout.flush()


def _terminate(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> NoReturn:
    """Run a demonstration; exit status 0 if every step succeeded; 1 if not; 130 after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminate)
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Shows guestpull on real images: a pull, a container, reuse; or, with `bake`, a guest image.",
        epilog="The images are created once, and kept in $GUESTPULL_DEMO_DIR (~/.cache/guestpull-demo).",
    )
    parser.add_argument(
        "story", nargs="?", default="pull", choices=("pull", "bake"), help="which story [pull]"
    )
    try:
        _run(parser.parse_args().story)
    except DemoFailed as error:
        sys.stderr.write(f"\ndemo FAILED: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("\ndemo: stopped; only the created images are kept\n")
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
