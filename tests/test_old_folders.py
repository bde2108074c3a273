"""Folders of earlier releases load, and give what they gave; `old_folders.py` writes those of a new one."""

import json

import pytest
import torch
from old_folders import FIXTURES, hits, results

from mmgem.training.loading import load_checkpoint
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import verify_index


@pytest.mark.parametrize("folder", sorted(FIXTURES.iterdir()), ids=lambda folder: folder.name)
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
