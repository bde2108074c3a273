import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def test_every_requirement_is_pinned_among_the_tested_versions():
    from importlib.metadata import requires

    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name_of(requirement) for requirement in requires("mmgem")} - {"mmgem"} <= pinned


def test_the_oldest_tested_versions_are_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if "==" in line)
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+).*", one).groups() for one in requirements if ">=" in one)
    assert len(bounds) > 15
    assert {name_of(name): bound for name, bound in bounds.items()} == {
        name_of(name): oldest[name_of(name)] for name in bounds
    }


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    for target in targets:
        assert re.search(rf"^{target}:.*## ", makefile, re.M), target


@pytest.mark.slow
def test_a_wheel_holds_the_three_packages_under_one_name(tmp_path):
    source = tmp_path / "source"
    for folder in ("modeling_mmgem", "processing", "training"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mmgem"}
    for folder, package in (
        ("modeling_mmgem", "mmgem"),
        ("processing", "mmgem/processing"),
        ("training", "mmgem/training"),
    ):
        for file in (ROOT / folder).iterdir():
            assert not file.is_file() or f"{package}/{file.name}" in names
