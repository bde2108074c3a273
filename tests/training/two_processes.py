"""Gradients of one step on two processes, case by case, and an evaluation; see test_distribution.py."""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from knowing_model import knowable_rows
from one_step import gradient_of_one_step, read_processor, rows
from stock_step import stock_gradient
from tiny_models import build_model
from torchrun import leave

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.evaluation.evaluate import evaluate_model
from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE
from mmgem.training.recipes.run import only_job

TEXTS = [{"text": "a sentence about nothing in particular"}, {"text": "another"}]
WRONG = {"hard_negatives": ["a blue star", "no star at all"]}
ASKED = {"qa": [{"question": "what is it?", "answer": "a heart"}]}


def edited() -> dict:
    """Columns of a row whose image, once edited, is another picture."""
    return {"edit": {"instruction": "add a moon", "file_name": "edited.png"}, "edited_image": rows()[0]["image"]}


# Beside what is drawn by default: fused queries, documents that are images, and what is written from memory.
DRAWN = {
    "hard_negatives_per_image": 2,
    "edits_per_image": 1,
    "memory_captions_per_image": 1,
    "memory_questions_per_image": 1,
    "match_captions_per_image": 1,
}
PARTS = {  # what each of the two processes gets, in quarters in two steps
    "alike": lambda: [rows()[:2], rows()[2:]],
    "boxes on one": lambda: [rows()[2:], rows()[:2]],
    "three and one": lambda: [rows()[1:], rows()[:1]],
    "texts on one": lambda: [rows(), TEXTS],
    "texts and images on one": lambda: [TEXTS[:1] + rows()[:1] + TEXTS[1:], rows()[1:]],
    "images on one": lambda: [rows()[:3], [{"image": rows()[3]["image"]}]],
    "distractors on one": lambda: [rows()[:2], [rows()[2], {"image": rows()[3]["image"]}]],
    "an edit and a question on one": lambda: [rows()[:2], [rows()[2] | ASKED | edited(), rows()[3]]],
    "hard negatives on one": lambda: [rows()[:2], [rows()[2] | WRONG, rows()[3]]],
    "quarters": lambda: [[row] for row in rows()],
}
# Every parameter has a part in every step of every process, or else DDP complains, or waits.
EXACT = {"ddp_find_unused_parameters": False}
CACHED = EXACT | {"grad_cache_chunk_size": 1}
ACCUMULATED = {"gradient_accumulation_steps": 2}


# Whatever divides the work; one process has to step alike without it.
DIVIDING = ("ddp_find_unused_parameters", "grad_cache_chunk_size", "gradient_checkpointing")


def cases() -> dict[str, tuple[str, dict]]:
    """Name to (which of `PARTS`, arguments)."""
    alike = [name for name in PARTS if name != "quarters"]
    cases = {name: (name, EXACT) for name in alike} | {f"{name}, cached": (name, CACHED) for name in alike}
    return cases | {
        "by default": ("alike", {}),
        "checkpointed": ("texts on one", {"gradient_checkpointing": True}),
        "accumulated": ("quarters", ACCUMULATED),
        "accumulated, cached": ("quarters", ACCUMULATED | CACHED),
        "without caption loss": ("alike", EXACT | {"caption_loss_weight": 0.0}),
        "without contrastive loss": ("alike", EXACT | {"contrastive_loss_weight": 0.0}),
    }


def gradient(processor, folder, items: list[list[dict]], items_per_batch: int, **arguments):
    """Of a step on items that are lists of rows."""
    collator = MMGEMCollator(processor, **DRAWN)
    return gradient_of_one_step(
        processor,
        str(folder),
        train_dataset=items,
        data_collator=lambda batch: collator([row for item in batch for row in item]),
        per_device_train_batch_size=items_per_batch,
        train_sampling_strategy="sequential",
        **arguments,
    )


def evaluation(processor) -> dict:
    """Metrics and captions of a random model, on an odd number of rows; some lack a caption, some their boxes."""
    data = knowable_rows(5)
    data[0] |= {"captions": [], "boxes": [], "region_captions": [], "instructions": []}
    data[3] |= {"captions": None, "long_caption": None}
    samples: list[dict] = []
    options = {"batch_size": 2, "max_new_tokens": 8, "samples": samples, "caption_judge": SCENE_JUDGE}
    metrics = evaluate_model(build_model(), processor, data, **options)
    return {"metrics": metrics, "samples": samples}


def lock(out: Path) -> str:
    """Whether this process, as one of a job, may write there."""
    try:
        with only_job(out):
            dist.barrier()
            return "may write"
    except OSError as error:
        return type(error).__name__


if __name__ == "__main__":
    gc.freeze()  # what was imported stays
    folder = Path(sys.argv[1])
    processor = read_processor(str(folder / "tokenizer"))
    gradients = {
        name: gradient(processor, folder, PARTS[parts](), 1, **arguments)
        for name, (parts, arguments) in cases().items()
    }
    rank = dist.get_rank()
    gradients["stock"] = stock_gradient(processor, folder, [rows()[:3], rows()[3:]])
    torch.save(gradients, folder / f"gradients-{rank}.pt")
    (folder / f"evaluation-{rank}.json").write_text(json.dumps(evaluation(processor)))
    (folder / f"locks-{rank}.json").write_text(
        json.dumps({name: lock(folder / name) for name in ("held", "free", "tokenizer/tokenizer.json/out")})
    )
    leave()
