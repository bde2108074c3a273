"""The README and the pages it leads to are a promise: their snippets run, in order and as they stand, and the figures
of the card are the checkpoint's."""

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

from mmgem.training.scenes.dataset import write_scene_folder

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *(ROOT / "docs" / f"{name}.md" for name in ("use", "embedding_modes", "command_line", "train"))]
TINY = ROOT / "model_cards" / "mmgem-tiny"
WITHOUT_MMGEM = "import sys; sys.modules['mmgem'] = None  # as if the package were not installed\n"
COMMAND = "from mmgem.training.cli import app; app()"


def snippets(page):
    return re.findall(r"```(bash|python|yaml)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


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
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    code_of_page = snippets(page)
    if not any("mmgem scenes gallery" in code for _, code in code_of_page):
        write_scene_folder(tmp_path / "gallery", 7, 12)
    started = {"bash", "python"} if page != README else set()
    for (language, code), (_, following) in pairwise([*code_of_page, ("", "")]):
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
    languages = [language for page in PAGES for language, _ in snippets(page)]
    assert languages.count("python") >= 10 and languages.count("bash") >= 3 and "yaml" in languages
    assert all(snippets(page) for page in PAGES)


def test_the_readme_is_a_screen_or_two_and_leads_to_every_page():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\(docs/(\w+\.md)\)", text))


def test_figures_are_those_of_the_checkpoint():
    results = json.loads((TINY / "results.json").read_text())
    card = (TINY / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| ([a-z_0-9@]+) \| ([0-9.]+) \| .+ \|$", card, flags=re.MULTILINE))
    assert table == {name: f"{value:.3f}" for name, value in results.items()}
