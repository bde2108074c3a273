"""The benchmark of the options of the contrastive loss, in a setting of seconds, on a random model."""

from statistics import mean

import pytest
import torch
from tiny_models import build_model

from benchmarks import contrastive_losses
from benchmarks.compression_data import Setting, Stage
from benchmarks.contrastive_losses import OPTIONS, PLAIN, report, run_all, with_wrong_pairs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_processor):
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    build_model().save_pretrained(checkpoint)
    tiny_processor.save_pretrained(checkpoint)
    compress = Stage(1, 0.0, {"memory_captions_per_image": 1})
    return Setting(
        str(checkpoint), (1,), 2, (8,), 1, 4, compress=compress, match=Stage(4, 1e-3, {"captions_per_image": 1})
    )


def test_wrong_pairs_are_as_many_as_said():
    batch = {"input_ids": torch.zeros(8, 3), "image_index": torch.arange(8)}
    assert with_wrong_pairs(batch, 0.0)["image_index"].tolist() == list(range(8))
    assert with_wrong_pairs(batch, 0.25)["image_index"].tolist() == [1, 0, *range(2, 8)]


def test_every_option_is_run_once_and_a_stopped_benchmark_goes_on(setting, tmp_path, monkeypatch):
    options = {name: OPTIONS[name] for name in (PLAIN, "soft_targets 0.4", "sigmoid")}
    monkeypatch.setattr(contrastive_losses, "OPTIONS", options)
    first = run_all(setting, tmp_path, 0.25)
    assert [(line["option"], line["seed"]) for line in first] == [(name, seed) for seed in (0, 1) for name in options]
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text()[:-10])  # the last line is cut off
    assert run_all(setting, tmp_path, 0.25) == first  # runs repeat

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report(first).splitlines()[2:]]
    recalls = {name: [line["recall"] for line in first if line["option"] == name] for name in options}
    assert [row[0] for row in rows] == list(options) and rows[0][2] == ""
    for name, row in zip(options, rows, strict=True):
        assert float(row[1].split(" ± ")[0]) == pytest.approx(mean(recalls[name]), abs=6e-4)
        if name != PLAIN:
            gain = mean(recalls[name]) - mean(recalls[PLAIN])
            assert float(row[2].split(" ± ")[0]) == pytest.approx(gain, abs=6e-4)
