"""Resuming with other batches: at the same row, or not at all."""

import datasets
import pytest
import torch
from image_bytes import png
from one_step import rows
from tiny_models import build_model
from transformers import TrainerCallback

from mmgem.training.data import streams
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.sources import DatasetSource
from mmgem.training.data.streams import StreamSource
from mmgem.training.trainer.data_position import BOOKMARKS_NAME, DataPosition
from mmgem.training.trainer.trainer import MMGEMTrainer, MMGEMTrainingArguments

ROWS_PER_STEP = 8


class RowKeys(TrainerCallback):
    """The rows of each step, which computes nothing else."""

    def __init__(self, trainer):
        self.of_steps = [[]]

        def note(model, inputs, num_items_in_batch=None):
            self.of_steps[-1] += inputs.get("row_keys", [])
            return torch.zeros(())

        trainer.training_step = note

    def on_step_end(self, args, state, control, **kwargs):
        self.of_steps.append([])


def read_files(files):
    for file in files:
        for number in range(20):
            yield {"image": png((file, number, 0)), "text": f"{file} {number}"}


def make_mixture(kind):
    source = DatasetSource([{"image": png((i, 0, 0)), "text": str(i)} for i in range(30)])
    if kind == "stream":
        stream = datasets.IterableDataset.from_generator(read_files, gen_kwargs={"files": list(range(4))})
        source = StreamSource(stream, "stream")
    return Mixture([source, DatasetSource(rows(), "others")], [3, 1], seed=0, num_samples=6 * ROWS_PER_STEP)


def train(processor, folder, data, resume=None, max_steps=6, **arguments):
    arguments = MMGEMTrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_steps=max_steps,
        save_strategy="no" if resume else "steps",
        save_steps=3,
        **arguments,
    )
    trainer = MMGEMTrainer(build_model(), arguments, processing_class=processor, train_dataset=data)
    keys = RowKeys(trainer)
    trainer.add_callback(keys)
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    return keys.of_steps[:-1]


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_another_split_of_a_step_goes_on_at_the_same_row(tiny_processor, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(streams, "BLOCK_SIZE", 4)
    monkeypatch.setattr(StreamSource, "block_size", 4)
    monkeypatch.setattr(streams, "BOOKMARK_EVERY", 4)

    def run(batch_size, accumulation_steps, resume=None):
        arguments = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation_steps}
        return train(tiny_processor, tmp_path, make_mixture(kind), resume, **arguments)

    whole = run(4, 2)
    assert len(whole) == 6 and len({key for keys in whole for key in keys}) > 20
    for batch_size, accumulation_steps in ((8, 1), (2, 4)):
        assert run(batch_size, accumulation_steps, "checkpoint-3") == whole[3:]
    bookmarks = list((tmp_path / "checkpoint-3" / BOOKMARKS_NAME).glob("source-0-*"))
    assert len(bookmarks) == (kind == "stream")


@pytest.mark.slow
def test_streams_keep_the_readers_they_began_with(tiny_processor, tmp_path):
    def run(workers, resume=None, folder=tmp_path):
        arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        return train(
            tiny_processor, folder, make_mixture("stream"), resume, dataloader_num_workers=workers, **arguments
        )

    whole = run(2)
    assert {key.split("/")[0] for keys in whole for key in keys if "stream" in key} == {
        "stream:0-of-2",
        "stream:1-of-2",
    }
    for workers in (0, 2):
        assert run(workers, "checkpoint-3") == whole[3:]
    assert run(1, folder=tmp_path / "one") != whole


@pytest.mark.parametrize("make_data", [lambda: make_mixture("rows"), rows], ids=["mixture", "list"])
def test_a_step_of_other_rows_is_refused(tiny_processor, tmp_path, make_data):
    train(tiny_processor, tmp_path, make_data(), per_device_train_batch_size=4, max_steps=3)
    message = (
        "`per_device_train_batch_size` x processes x `gradient_accumulation_steps` is 2 x 1 x 1 = 2 rows a step; "
        "expected 4, as the checkpoint was trained with: 4 x 1 x 1 = 4."
    )
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        train(tiny_processor, tmp_path, make_data(), "checkpoint-3", per_device_train_batch_size=2)
    arguments = {"per_device_train_batch_size": 2, "ignore_data_skip": True}
    assert len(train(tiny_processor, tmp_path, make_data(), "checkpoint-3", **arguments)) == 3


def test_processes_count_as_batches_do(tmp_path):
    DataPosition(None).begin(4, 2, 1, num_workers=0)
    position = DataPosition(None)
    position.begin(4, 2, 3, num_workers=0)
    position.save(tmp_path, is_main_process=True)
    for layout in ((4, 2, 3), (8, 3, 1), (1, 24, 1), (24, 1, 1)):
        DataPosition(None).begin(*layout, num_workers=2, checkpoint=tmp_path)
    for layout in ((4, 3, 3), (4, 2, 1), (8, 2, 3)):
        with pytest.raises(ValueError, match="expected 24, as the checkpoint was trained with: 4 x 2 x 3 = 24"):
            DataPosition(None).begin(*layout, num_workers=0, checkpoint=tmp_path)


def test_a_checkpoint_that_does_not_say_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no data_layout.json; expected a checkpoint of MMGEMTrainer"):
        DataPosition(None).begin(4, 2, 1, num_workers=0, checkpoint=tmp_path)
