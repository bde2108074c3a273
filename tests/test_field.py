"""The links of all pages lead somewhere, what they install is there, and what `docs/field.md` names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("modeling_mmgem", "processing", "training")
SOURCES = "\n".join(file.read_text() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target, _, place in re.findall(r"\]\(([^)#\s]*)(#([^)]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert place in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_package_is_installed_from_the_checkout(page):
    """It is not on PyPI, where somebody else may take the name."""
    assert not re.search(r"pip install [^`\n]*mmgem", page.read_text())


def test_every_option_of_the_field_is_in_the_code():
    page = (ROOT / "docs" / "field.md").read_text()
    names = {name.strip('"') for name in re.findall(r"`([^`]+)`", page)}
    assert len(names) > 40
    for name in names:
        if name.startswith("mmgem "):
            command, *options = name.split()[1:]
            assert re.search(rf"def {command}\(", SOURCES), name
            name = options[0] if options else command
        assert name.removeprefix("--").replace("-", "_") in SOURCES, name


def test_every_system_is_named_once():
    page = (ROOT / "docs" / "field.md").read_text()
    rows = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    systems = [part for row in rows for part in re.split(r", (?![^(]*\))", re.sub(r" \([^)]*\)$", "", row))]
    systems = [name for name in systems if name not in ("system", "---")]
    assert len(systems) == len(set(systems)) > 110
