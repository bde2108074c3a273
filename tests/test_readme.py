"""The README is a promise: its snippets run, in order and as they stand, and its figures are the checkpoint's."""

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import fresh_process
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = ROOT / "model_cards" / "mmgem-tiny"
WITHOUT_MMGEM = "import sys; sys.modules['mmgem'] = None  # as if the package were not installed\n"
COMMAND = "from mmgem.training.cli import app; app()"


def snippets():
    return re.findall(r"```(bash|python|yaml)\n(.*?)```", README, flags=re.DOTALL)


def run(language: str, code: str, folder: Path):
    """A snippet, each command of it in a process of its own."""
    if language == "python":
        fresh_process.run(code, cwd=folder, installed="from mmgem" in code)
        return
    for line in filter(None, code.splitlines()):
        program, *arguments = shlex.split(line, comments=True)
        assert program == "mmgem"
        fresh_process.run(COMMAND, *arguments, cwd=folder, installed=True)


def run_from_nothing(language: str, code: str, folder: Path):
    """The same in a process that has not been forked."""
    command = [sys.executable, "-c", WITHOUT_MMGEM + code] if language == "python" else ["bash", "-euc", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, f"{code}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.pages
def test_snippets_run(tmp_path):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    started = set()
    for (language, code), (_, following) in pairwise([*snippets(), ("", "")]):
        if language == "yaml":
            (tmp_path / "recipe.yaml").write_text(code)
            if "mmgem train recipe.yaml" not in following:
                run("bash", "mmgem train recipe.yaml --out runs/recipe", tmp_path)
        elif language in started:
            run(language, code, tmp_path)
        else:
            started.add(language)
            run_from_nothing(language, code, tmp_path)


def test_there_are_snippets_of_each_kind():
    languages = [language for language, _ in snippets()]
    assert languages.count("python") >= 5 and languages.count("bash") >= 2 and "yaml" in languages


@pytest.mark.parametrize("page", [ROOT / "README.md", TINY / "README.md"], ids=["readme", "card"])
def test_figures_are_those_of_the_checkpoint(page):
    results = json.loads((TINY / "results.json").read_text())
    table = dict(
        re.findall(r"^\| ([a-z_0-9@]+) \| ([0-9.]+) \|$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    assert table == {name: f"{value:.3f}" for name, value in results.items()}


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
