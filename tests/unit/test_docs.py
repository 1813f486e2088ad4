"""The documents: what they name exists, and what they say of the configuration and of files is true."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from guestpull_server.config import FILE_NAME, Configuration, Limits
from support.images import file, image, layer
from support.stores import open_store, pulled

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
CONFIGURATION = ROOT / "docs" / "configuration.md"
FILES = ROOT / "docs" / "files.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PLACES_OF_MODULES = ("server/guestpull_server", "client/guestpull_client", ".")

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
MODULE = re.compile(r"(?<![\w./-])((?:[\w.-]+/)*\w+\.py)\b")
PATH = re.compile(r"(?<![\w./-])((?:scripts|tests|docs|server|client|protos)/[\w./-]*\w)")
DEFAULT = re.compile(r"([\d,]+(?:\.\d+)?)(?: ([KMG])iB)?")
FACTOR = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def identified(document: Path) -> str:
    return str(document.relative_to(ROOT))


def anchors_of(document: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def rows_of(table: str) -> dict[str, str]:
    """The first two cells of each row of a table whose first cell is code."""
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", table, re.MULTILINE))


def section(document: Path, heading: str) -> str:
    _, found, rest = document.read_text().partition(f"\n## {heading}\n")
    assert found, f"{document} has no section {heading!r}"
    return rest.partition("\n## ")[0]


def default_in(cell: str) -> float:
    read = DEFAULT.fullmatch(cell)
    assert read is not None, cell
    return float(read[1].replace(",", "")) * FACTOR[read[2] or ""]


@pytest.mark.parametrize("document", DOCUMENTS, ids=identified)
def test_relative_links_lead_somewhere(document: Path) -> None:
    for path, anchor in LINK.findall(document.read_text()):
        target = document.parent / path if path else document

        assert target.exists(), path
        if anchor:
            assert anchor in set(anchors_of(target)), f"{path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=identified)
def test_modules_that_are_named_exist(document: Path) -> None:
    named = set(MODULE.findall(document.read_text()))

    places = (document.parent, *(ROOT / place for place in PLACES_OF_MODULES))

    assert {module for module in named if not any((place / module).is_file() for place in places)} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=identified)
def test_paths_in_the_repository_that_are_named_exist(document: Path) -> None:
    named = {name for name in PATH.findall(document.read_text()) if not name.endswith(".py")}

    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_each_limit_is_listed_with_its_default() -> None:
    listed = {name: default_in(cell) for name, cell in rows_of(section(CONFIGURATION, "Limits")).items()}

    assert listed == msgspec.structs.asdict(Limits())


def test_each_key_of_the_configuration_is_listed() -> None:
    listed = set(rows_of(section(CONFIGURATION, "Keys")))

    assert listed == {field.encode_name for field in msgspec.structs.fields(Configuration)}


def test_each_name_in_a_work_directory_is_listed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    pulled(store, image(layer(file("a"))), "docker.io/library/shop:latest")
    there = {path.name for path in tmp_path.iterdir()}
    store.close()

    cells = re.findall(r"^\| `([^`]+)` \|", section(FILES, "The work directory"), re.MULTILINE)

    assert {cell.partition("/")[0] for cell in cells} == there | {FILE_NAME}


def test_the_walk_of_a_cold_pull_names_each_module_once() -> None:
    steps = re.findall(r"^\d+\. \*\*`([\w./]+\.py)`\*\*", section(ARCHITECTURE, "A cold pull"), re.MULTILINE)

    assert len(steps) > 10
    assert {module for module, times in Counter(steps).items() if times > 1} == set()
