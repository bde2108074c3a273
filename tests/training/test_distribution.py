"""Two processes do what one does; and when one of them dies, the other does not wait for it."""

import json

import dying_rank
import fsdp_run
import killed_run
import pytest
import torch
import two_processes
from one_step import rows
from stock_step import stock_gradient
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torchrun import assert_both_step, run_on_two, torchrun, torchrun_command

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.output_lock import only_writer
from mmgem.training.trainer.checkpoints import last_complete_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    with only_writer(folder / "held"):
        return run_on_two(two_processes, tiny_processor, folder)


@pytest.fixture(scope="module")
def gradient_of_one(tiny_processor, tmp_path_factory):
    """The gradient of one process, computed once for all cases that differ in how the work is divided."""
    gradients: dict[str, dict[str, torch.Tensor]] = {}

    def gradient_of_one(case: str) -> dict[str, torch.Tensor]:
        parts, arguments = two_processes.cases()[case]
        arguments = {name: value for name, value in arguments.items() if name not in two_processes.DIVIDING}
        key = json.dumps([parts, arguments])
        if key not in gradients:
            items, folder = two_processes.PARTS[parts](), tmp_path_factory.mktemp("one_process")
            gradients[key] = two_processes.gradient(tiny_processor, folder, items, 2, **arguments)
        return gradients[key]

    return gradient_of_one


@pytest.mark.parametrize("case", two_processes.cases())
def test_gradient_is_that_of_one_process(folder, gradient_of_one, case):
    assert_both_step(folder, case, gradient_of_one(case))


def test_gradient_of_the_stock_trainer_is_that_of_one_process(folder, tiny_processor, tmp_path):
    assert_both_step(folder, "stock", stock_gradient(tiny_processor, tmp_path, [rows()]))


def test_evaluation_is_that_of_one_process(folder, tiny_processor):
    expected = json.loads(json.dumps(two_processes.evaluation(tiny_processor)))
    assert expected["metrics"]["text_to_image_recall@5"] == 1 and len(expected["samples"]) == 5
    for rank in (0, 1):
        assert json.loads((folder / f"evaluation-{rank}.json").read_text()) == expected


def test_all_processes_of_a_job_are_refused_or_write_together(folder):
    for rank in (0, 1):
        assert json.loads((folder / f"locks-{rank}.json").read_text()) == {
            "held": "BlockingIOError",
            "free": "may write",
            "tokenizer/tokenizer.json/out": "NotADirectoryError",
        }


@pytest.mark.parametrize("moment", [pytest.param("step", marks=pytest.mark.pages), "saving", "hanging"])
def test_process_that_dies_or_hangs_ends_the_run(tiny_processor, tmp_path, moment):
    tiny_processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    if moment == "step":  # as the README says, of the command itself
        assert torchrun_command(dying_rank, tmp_path, moment) != 0
    else:
        with pytest.raises(ChildFailedError):
            torchrun(dying_rank, tmp_path, moment)
    assert not (tmp_path / "weights.pt").exists()
    if moment != "saving":
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        return
    # The checkpoint is not whole without the file of the process that died.
    with pytest.warns(UserWarning, match="not whole: .*checkpoint-2"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")

    torchrun(dying_rank, tmp_path, "never")
    weights = torch.load(tmp_path / "weights.pt")
    uninterrupted = killed_run.train(tiny_processor, tmp_path / "one_process", is_seeded=True).model
    for name, tensor in uninterrupted.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def fsdp(tiny_processor, tmp_path_factory):
    return run_on_two(fsdp_run, tiny_processor, tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def one_process(tiny_processor, tmp_path_factory):
    """The folder of a run on one process, and its report."""
    folder = tmp_path_factory.mktemp("one_process")
    return folder, fsdp_run.train(tiny_processor, folder, 4, **fsdp_run.CAPTIONED)


@pytest.mark.parametrize("run", ["captioned", "resumed", "cached"])
def test_fsdp_steps_and_evaluates_as_one_process_does(fsdp, one_process, tiny_processor, tmp_path, run):
    report = json.loads((fsdp / "report.json").read_text())
    assert report[run]["is_sharded"]
    expected = fsdp_run.train(tiny_processor, tmp_path, 4, **fsdp_run.EMA) if run == "cached" else one_process[1]
    for actual, step in zip(report[run]["steps"], expected["steps"], strict=True):
        assert actual == pytest.approx(step, rel=1e-5)
    count = 1 if run == "resumed" else len(expected["metrics"])
    assert len(expected["metrics"]) == (3 if run == "cached" else 2)
    for actual, metrics in zip(report[run]["metrics"][-count:], expected["metrics"][-count:], strict=True):
        assert actual == pytest.approx(metrics)


def test_fsdp_checkpoint_loads_as_any_other(fsdp, one_process):
    folder = fsdp / "run" / "checkpoint-2"
    assert last_complete_checkpoint(fsdp / "run") == str(folder)
    plain = one_process[0] / "checkpoint-2"
    weights = MMGEMModel.from_pretrained(folder).state_dict()
    for name, tensor in MMGEMModel.from_pretrained(plain).state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # Its code is the model's, not that of the class which FSDP makes of it.
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in plain.glob("*.py")}
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, plain)]
    assert configs[0] == configs[1] and configs[0]["auto_map"]["AutoModel"] == "modeling_mmgem.MMGEMModel"
