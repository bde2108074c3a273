"""Folders of earlier releases load, and give what they gave; `old_folders.py` writes those of a new one."""

import json
import shutil

import pytest
import torch
from old_folders import FIXTURES, hits, results
from safetensors.torch import load_file

from mmgem.training.loading import load_checkpoint
from mmgem.training.recipes.run import train
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import verify_index

releases = pytest.mark.parametrize("folder", sorted(FIXTURES.iterdir()), ids=lambda folder: folder.name)


@releases
def test_folders_of_a_release_give_what_they_gave(folder):
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    model, processor = load_checkpoint(folder / "checkpoint")
    actual = results(model, processor)
    assert actual["captions"] == expected["captions"]
    for name in ("images", "texts", "fused"):
        torch.testing.assert_close(torch.tensor(actual[name]), torch.tensor(expected[name]), rtol=0, atol=1e-5)
    assert not verify_index(folder / "index").damaged
    found = hits(SearchIndex.load(folder / "index", model, processor))
    assert [name for name, _ in found] == [name for name, _ in expected["hits"]]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected["hits"]], abs=1e-5)


@pytest.mark.slow
@releases
def test_a_run_that_a_release_began_is_gone_on_with(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds stage `only`; expected `resume`"):
        train("recipe.yaml", "out")
    report = train("recipe.yaml", "out", resume=True)
    log = json.loads((report.model / "training_log.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in log] == [2]
    weights = load_file(report.model / "model.safetensors")
    for name, expected in load_file(folder / "run" / "expected.safetensors").items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
