"""A short run, to be killed and resumed; see test_kill.py and test_distribution.py.

As a script it runs in a process of its own for each of many moments, kills it there, and resumes. They are forked from
one that has imported everything and computed no gradient.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers.modeling_utils
import transformers.trainer_utils
from one_step import CAPTIONS, read_processor, rows
from tiny_models import build_model
from transformers import TrainerState

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.trainer.checkpoints import last_complete_checkpoint
from mmgem.training.trainer.trainer import MMGEMTrainer, MMGEMTrainingArguments

STEPS, SAVE_STEPS = 3, 1
RANDOM_MOMENTS = 2
FILES = ["config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
MOMENTS = [*FILES, "complete.json", "rotation", "end", *[f"random {number}" for number in range(RANDOM_MOMENTS)]]


def train(
    processor,
    folder: Path,
    batch_size: int = 4,
    resume: str | None = None,
    callbacks=(),
    is_seeded: bool = False,
) -> MMGEMTrainer:
    """Over 8 rows in random order, of whose captions one is drawn at random; if seeded, whichever process draws."""
    data = [row | {"captions": CAPTIONS[k:] + [f"number {k}"]} for k, row in enumerate(rows() + rows())]
    if is_seeded:
        data = [row | {"draw_seed": k} for k, row in enumerate(data)]
    arguments = MMGEMTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        adam_epsilon=0.1,  # a step is then smooth in its gradient, also where that is almost nothing
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MMGEMTrainer(
        build_model(), arguments, processing_class=processor, train_dataset=data, callbacks=[*callbacks]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_in_two_halves(at_half: Callable[[Path], None]):
    """Makes every large file of a checkpoint appear by halves, and calls `at_half` between them."""

    def halved(save):
        def save_in_two_halves(content, path, *args, **kwargs):
            save(content, path, *args, **kwargs)
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            at_half(Path(path))
            Path(path).write_bytes(whole)

        return save_in_two_halves

    transformers.modeling_utils.safe_save_file = halved(transformers.modeling_utils.safe_save_file)
    torch.save = halved(torch.save)
    TrainerState.save_to_json = halved(TrainerState.save_to_json)
    transformers.PreTrainedConfig.to_json_file = halved(transformers.PreTrainedConfig.to_json_file)

    replace, rmtree = Path.replace, shutil.rmtree

    def replace_late(path, target):
        at_half(Path(target))
        return replace(path, target)

    def rmtree_by_halves(folder, *args, **kwargs):
        files = sorted(Path(folder).iterdir())
        for file in files[len(files) // 2 :]:
            file.unlink()
        at_half(Path("rotation"))
        return rmtree(folder, *args, **kwargs)

    Path.replace, transformers.trainer_utils.shutil.rmtree = replace_late, rmtree_by_halves


def die_at(name: str) -> Callable[[Path], None]:
    """Of the second checkpoint, in the middle of this file; the first is whole by then."""
    return lambda path: die() if path.name == name and path.parent.name in ("checkpoint-2", "") else None


def in_own_process(task: Callable[[], None], seconds: float = 0.0) -> tuple[bool, float]:
    """Runs a task, killed after some seconds of computing, if any are given. Returns whether it was killed, so or by
    itself, and for how many seconds it has computed: unlike those of a clock, the same on a busy machine.
    """
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            task()
            os._exit(0)
        finally:  # of an error
            os._exit(1)
    _, status, usage = os.wait4(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGPROF)
    if status and not killed:
        raise RuntimeError(f"a run ended with status {status}")
    return killed, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    gc.freeze()  # what was imported stays
    root = Path(sys.argv[1])

    def run(folder: Path, at_half: Callable[[Path], None] | None = None):
        processor = read_processor(str(root / "tokenizer"))
        if at_half is not None:
            write_in_two_halves(at_half)
        train(processor, folder)
        if at_half is not None:
            at_half(Path("end"))

    def resume(folder: Path):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            checkpoint = last_complete_checkpoint(folder)
        trainer = train(read_processor(str(root / "tokenizer")), folder, resume=checkpoint)
        torch.save(trainer.model.state_dict(), folder / "weights.pt")
        report = {
            "resumed_from": checkpoint and Path(checkpoint).name,
            "ignored": [str(w.message) for w in caught if "not whole" in str(w.message)],
            "last": Path(last_complete_checkpoint(folder)).name,
            "steps": trainer.state.global_step,
        }
        (folder / "report.json").write_text(json.dumps(report))

    with torch.no_grad():  # what a forward pass finds out is known to all; autograd's threads would not survive a fork
        build_model()(**MMGEMCollator(read_processor(str(root / "tokenizer")))(rows()))
    in_own_process(lambda: resume(root / "uninterrupted"))
    durations = {}
    clock = random.Random(0)
    for moment in MOMENTS:
        folder = root / moment
        if moment.startswith("random"):
            seconds = durations["end"] * clock.uniform(0.1, 0.7)
            killed, _ = in_own_process(lambda: run(folder, lambda path: None), seconds)  # noqa: B023
        else:
            killed, durations[moment] = in_own_process(lambda: run(folder, die_at(moment)))  # noqa: B023
        in_own_process(lambda: resume(folder))  # noqa: B023
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps(report | {"killed": killed}))
