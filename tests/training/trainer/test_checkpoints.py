"""Which checkpoint is whole, and that a full disk costs only the one that is being written."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from one_step import rows
from safetensors.torch import save_file
from tiny_models import build_model
from transformers import TrainerCallback

from mmgem.training.trainer.checkpoints import (
    MARKER_NAME,
    is_complete,
    is_disk_full,
    last_complete_checkpoint,
    mark_complete,
    mark_unfinished,
)
from mmgem.training.trainer.trainer import MMGEMTrainer, MMGEMTrainingArguments


def write(folder: Path, complete: bool = True) -> Path:
    (folder / "shards").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"w" * 100)
    (folder / "shards" / "0.bin").write_bytes(b"s" * 10)
    if complete:
        mark_complete(folder)
    return folder


def test_marked_checkpoint_lists_its_files(tmp_path):
    folder = write(tmp_path / "checkpoint-1", complete=False)
    assert not is_complete(folder)
    mark_complete(folder)
    assert is_complete(folder)
    files = json.loads((folder / MARKER_NAME).read_text())
    assert {name: facts["bytes"] for name, facts in files.items()} == {"shards/0.bin": 10, "weights.bin": 100}
    mark_complete(folder)  # again, as each machine does that shares the folder
    assert is_complete(folder) and sorted(path.name for path in folder.iterdir()) == [
        MARKER_NAME,
        "shards",
        "weights.bin",
    ]


@pytest.mark.filterwarnings("ignore:.*is not whole")
@pytest.mark.parametrize("harm", ["cut", "removed", "rewritten"])
def test_marker_does_not_cover_what_happened_later(tmp_path, harm):
    folder = write(tmp_path / "checkpoint-1")
    if harm == "cut":
        os.truncate(folder / "weights.bin", 50)
    elif harm == "removed":
        (folder / "shards" / "0.bin").unlink()
    else:
        mark_unfinished(folder)
    assert not is_complete(folder)


@pytest.mark.parametrize("name", ["weights.bin", "shards/0.bin"])
def test_a_flipped_bit_is_found_and_named(tmp_path, name):
    folder = write(tmp_path / "checkpoint-1")
    content = bytearray((folder / name).read_bytes())
    content[5] ^= 1
    (folder / name).write_bytes(content)
    with pytest.warns(UserWarning, match=f"checkpoint-1' is not whole: {name} is damaged or missing"):
        assert not is_complete(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "null", '{"weights.bin": null}', '{"weights.bin": {}}', '{"weights.bin": "100"}']
)
def test_a_damaged_marker_falls_back_to_the_checkpoint_before(tmp_path, content):
    write(tmp_path / "checkpoint-1")
    (write(tmp_path / "checkpoint-2") / MARKER_NAME).write_text(content)
    with pytest.warns(UserWarning, match="checkpoint-2"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_marker_of_the_first_version_knows_sizes(tmp_path):
    folder = write(tmp_path / "checkpoint-1")
    (folder / MARKER_NAME).write_text(json.dumps({"shards/0.bin": 10, "weights.bin": 100}))
    assert is_complete(folder)
    os.truncate(folder / "weights.bin", 50)
    with pytest.warns(UserWarning, match="weights.bin is damaged"):
        assert not is_complete(folder)


def test_last_is_by_number_and_whole(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path / f"checkpoint-{step}")
    write(tmp_path / "checkpoint-x")
    write(tmp_path / "checkpoint-100.old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    write(tmp_path / "checkpoint-11", complete=False)
    (tmp_path / "checkpoint-12").mkdir()
    write(tmp_path / "checkpoint-1", complete=False)  # older than the whole one: of no interest
    with pytest.warns(UserWarning, match="not whole: .*checkpoint-12, .*checkpoint-11$"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_there_may_be_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    write(tmp_path / "checkpoint-1", complete=False)
    with pytest.warns(UserWarning, match="checkpoint-1"):
        assert last_complete_checkpoint(tmp_path) is None


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="`folder` is .*nowhere"):
        mark_complete(tmp_path / "nowhere")
    mark_unfinished(tmp_path / "nowhere")


def test_one_process_of_a_machine_marks(tmp_path, monkeypatch):
    folder = write(tmp_path / "checkpoint-1", complete=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    mark_complete(folder)
    assert not is_complete(folder)
    monkeypatch.setenv("LOCAL_RANK", "0")
    mark_complete(folder)
    monkeypatch.setenv("LOCAL_RANK", "1")
    mark_unfinished(folder)
    assert is_complete(folder)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
def test_errors_of_a_full_disk_are_known(tmp_path):
    (tmp_path / "file").symlink_to("/dev/full")
    for save in (lambda path: torch.save(torch.zeros(1000), path), lambda path: path.write_text("x" * 10000)):
        with pytest.raises((OSError, RuntimeError)) as caught:
            save(tmp_path / "file")
        assert is_disk_full(caught.value)
    with pytest.raises(Exception) as caught:
        save_file({"x": torch.zeros(1)}, tmp_path / "nowhere" / "file")
    assert not is_disk_full(caught.value)
    assert is_disk_full(Exception("Error while serializing: I/O error: No space left on device (os error 28)"))


class FullDisk(TrainerCallback):
    """From a step on, a file of its checkpoint cannot be written."""

    def __init__(self, step: int, name: str):
        self.step, self.name = step, name

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            folder = Path(args.output_dir, f"checkpoint-{self.step}")
            folder.mkdir()
            (folder / self.name).symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_full_disk_leaves_the_old_checkpoint(tiny_processor, tmp_path, name):
    def trainer(*callbacks):
        arguments = MMGEMTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            save_steps=2,
            save_total_limit=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return MMGEMTrainer(
            build_model(), arguments, processing_class=tiny_processor, train_dataset=rows(), callbacks=[*callbacks]
        )

    with pytest.raises(OSError, match="(?i)no space left.*checkpoint-2.*checkpoint-4"):
        trainer(FullDisk(4, name)).train()
    old = last_complete_checkpoint(tmp_path)
    assert old == str(tmp_path / "checkpoint-2")
    resumed = trainer()
    resumed.train(resume_from_checkpoint=old)
    assert resumed.state.global_step == 4 and last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not Path(old).exists()
