"""The benchmark of the options for few pairs, in a setting of seconds, on random towers."""

import json

import pytest
import torch
from PIL import Image
from tiny_models import build_model

from benchmarks import projectors
from benchmarks.projectors import OPTIONS, PLAIN, Setting, report, run_all
from mmgem.training.trainer.parameter_selection import set_trainable

pytestmark = pytest.mark.slow


@pytest.fixture
def setting(tmp_path):
    for split, count in (("train", 12), ("val", 10)):
        (tmp_path / split).mkdir()
        for number in range(count):
            Image.new("RGB", (32, 32), (20 * number, 99, 5)).save(tmp_path / split / f"{number}.png")
        lines = [json.dumps({"file_name": f"{number}.png", "captions": [f"a {number}"]}) for number in range(count)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
    return Setting("", str(tmp_path), pairs=(8, 12), held_out=10, steps=10, batch_size=8, seeds=2)


def test_every_option_is_run_once_and_a_stopped_benchmark_goes_on(setting, tiny_processor, tmp_path, monkeypatch):
    model = build_model(num_visual_tokens=1)
    set_trainable(model, train_only=projectors.TRAINED)
    for parameter in model.pool_aggregator.output.parameters():
        torch.nn.init.zeros_(parameter)  # as in a model that did not train: it pools
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(projectors, "compose", lambda setting: (model, tiny_processor))
    first = run_all(setting, tmp_path / "out")
    assert len(first) == len(OPTIONS) * 2 * 2 and all(
        0 <= line["recall@1"] <= line["recall@10"] <= 1 for line in first
    )
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, kept[name])}
    assert {name.partition(".")[0] for name in changed} == set(projectors.TRAINED)
    images = torch.load(tmp_path / "out" / "val.pt")["images"]
    with torch.no_grad():
        pixels = tiny_processor(images=[Image.new("RGB", (32, 32), (0, 99, 5))], return_tensors="pt")
        torch.testing.assert_close(images[0, 0], model._patch_grid(pixels["pixel_values"])[0].mean((1, 2)))

    path = tmp_path / "out" / "runs.jsonl"
    path.write_text(path.read_text()[:-10])  # the last line is cut off
    assert run_all(setting, tmp_path / "out") == first  # runs repeat
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report(first, setting).splitlines()[2:]]
    assert [row[:2] for row in rows] == [[str(pairs), option] for pairs in (8, 12) for option in OPTIONS]
    assert [row[4] == "" for row in rows] == [row[1] == PLAIN for row in rows]
