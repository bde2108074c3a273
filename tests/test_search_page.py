"""The page `docs/search.md`: its snippets run, in order and as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmgem.training.cli import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.pages
def test_snippets_run(tmp_path, monkeypatch):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    outputs = []
    for language, code in re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.DOTALL):
        if language == "python":
            exec(code, names)
            continue
        for line in code.splitlines():
            program, *arguments = shlex.split(line)
            result = CliRunner().invoke(app, arguments)
            assert program == "mmgem" and result.exit_code == 0, f"{line}\n{result.output}"
            outputs.append(result.stdout)
    hits = [line for line in outputs[2].splitlines() if line]
    assert len(hits) == 3 and all("  region  " in line for line in hits)
    assert (tmp_path / "hits.csv").is_file() and "--lexical-weight" in outputs[-1]


def test_every_option_of_the_page_is_one():
    options = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    known = "".join(CliRunner().invoke(app, [name, "--help"]).output for name in ("index", "search", "scenes"))
    assert {option for option in options if option not in known} == set()
