"""The errors and what the README says of them."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from pathlib import Path

from guestpull_server import errors
from guestpull_server.errors import GuestpullError

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_lists_each_reason_beside_its_code() -> None:
    raised: defaultdict[str, set[str]] = defaultdict(set)
    for _, one in inspect.getmembers(errors, inspect.isclass):
        if issubclass(one, GuestpullError):
            raised[one.status.value].add(one.reason)

    rows = re.findall(r"^\| ([A-Z_]+) \| (.*) \|$", README.read_text(), re.MULTILINE)
    listed = {code: set(re.findall(r"`([A-Z_]+)`", reasons)) for code, reasons in rows}

    assert listed == raised
