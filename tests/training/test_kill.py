"""A run that is killed, at any moment, ends where one ends that was not, once it is resumed."""

import json
from pathlib import Path

import fresh_process
import killed_run
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    tiny_processor.tokenizer.save_pretrained(folder / "tokenizer")
    script = Path(killed_run.__file__).read_text(encoding="utf-8")
    fresh_process.run(script, folder, cwd=folder, installed=True)
    return folder


@pytest.mark.parametrize("moment", killed_run.MOMENTS)
def test_resumed_run_ends_where_the_other_does(runs, moment):
    report = json.loads((runs / moment / "report.json").read_text())
    assert report["steps"] == killed_run.STEPS and report["last"] == f"checkpoint-{killed_run.STEPS}"
    if not moment.startswith("random"):
        assert report["killed"]
        # Once the second step's checkpoint has its marker, the first's may go; until then it is the one that counts.
        resumed_from = {"rotation": "checkpoint-2", "end": f"checkpoint-{killed_run.STEPS}"}
        assert report["resumed_from"] == resumed_from.get(moment, "checkpoint-1")
        assert ["checkpoint-2" in message for message in report["ignored"]] == [True] * (moment not in resumed_from)
    expected = torch.load(runs / "uninterrupted" / "weights.pt")
    weights = torch.load(runs / moment / "weights.pt")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_some_random_moment_was_in_time(runs):
    reports = [json.loads((runs / m / "report.json").read_text()) for m in killed_run.MOMENTS if "random" in m]
    assert any(report["killed"] for report in reports)
