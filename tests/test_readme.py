"""The README is a promise: its snippets run, in order and as they stand, and its figures are the checkpoint's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = ROOT / "model_cards" / "mmgem-tiny"


def snippets():
    return re.findall(r"```(bash|python|yaml)\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_snippets_run(tmp_path):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    for number, (language, code) in enumerate(snippets()):
        if language == "python" and "from mmgem" not in code:
            code = "import sys; sys.modules['mmgem'] = None  # as if the package were not installed\n" + code
        if language == "yaml":
            (tmp_path / "recipe.yaml").write_text(code)
            command = ["mmgem", "train", "recipe.yaml", "--out", f"runs/recipe-{number}"]
        else:
            command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, f"{code}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


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
