"""The page `docs/search_a_million_pictures.md`: its snippets run, two workers embed, and a job that ended goes on."""

import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mmgem.training.cli import app

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "search_a_million_pictures.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.pages
def test_snippets_run(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("qdrant_client", reason="qdrant_client is not installed")
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    outputs = []
    try:
        for language, code in re.findall(r"```(bash|python)\n(.*?)```", PAGE, flags=re.DOTALL):
            if language == "python":
                exec(code, names)
                if "ImageEmbedder" in code:  # again, with a picture that came since
                    shutil.copy(next(Path("photos").glob("*.png")), "photos/later.png")
                    before = {*Path("vectors").glob("*.parquet")}
                    exec(code.replace("ray.init(num_cpus=4)", ""), names)
                    later = {*Path("vectors").glob("*.parquet")} - before
                    assert sum(len(pq.read_table(file)) for file in later) == 1
                continue
            for line in code.splitlines():
                program, *arguments = shlex.split(line)
                result = CliRunner().invoke(app, arguments)
                assert program == "mmgem" and result.exit_code == 0, f"{line}\n{result.output}"
                outputs.append(result.stdout)
    finally:
        names["ray"].shutdown()
    pictures = len(list(Path("photos").glob("*.png")))
    assert names["report"].images == pictures and names["report"].skipped == []
    assert f"{pictures} images in million, 0 new" in outputs[2]
    hits = [Path(line.split()[1]).name for line in outputs[1].splitlines() if line]
    assert hits == names["found"]


def test_every_option_of_the_page_is_one():
    options = set(re.findall(r"`(--[a-z][a-z-]+)", PAGE))
    known = "".join(CliRunner().invoke(app, [name, "--help"]).output for name in ("index", "search"))
    assert {option for option in options if option not in known} == set()
