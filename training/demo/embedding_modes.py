"""The sections of a demonstration about images with texts, several vectors, and memories.

Each function returns what `demo.json` has, or nothing (an empty list, or None) for a model that cannot do it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from mmgem.late_interaction import similarity
from mmgem.training.demo.gallery import HITS, Gallery, show_hits
from mmgem.training.evaluation.metrics import answer_accuracy, recall_by_budget
from mmgem.training.evaluation.row_outputs import instructions_of
from mmgem.training.inference import (
    ANSWER_TOKENS,
    answer_from_memory,
    embed_fused,
    embed_regions,
    embed_texts,
    generate_answers,
)
from mmgem.training.search.index import SearchIndex

BATCH_SIZE = 64


def search_edits(gallery: Gallery, index: SearchIndex, count: int = 3) -> list[dict[str, Any]]:
    """Images with the instruction of their edit, which should find the twin: the image itself is nearly it."""
    if not _has_prompt(index.model, "edit"):
        return []
    return [
        {
            "file_name": row["file_name"],
            "instruction": row["edit"]["instruction"],
            "hits": show_hits(
                index.search(
                    row["edit"]["instruction"], image=index.folder / row["file_name"], top=HITS, prompt="edit"
                ),
                [row["edit"]["file_name"]],
            ),
        }
        for row in gallery.edited[:count]
    ]


def follow_instructions(gallery: Gallery, model, processor, count: int = 6) -> list[dict[str, Any]]:
    """The first images of several objects, with an instruction for each object; its region should be the nearest."""
    if not _has_prompt(model, "object"):
        return []
    numbers = [number for number, row in enumerate(gallery.rows) if instructions_of(row)][:count]
    rows = [gallery.dataset[number] for number in numbers]
    prompt = model.config.prompts["object"]
    shown = []
    for row in rows:
        texts = [one["text"] for one in row["instructions"]]
        queries = embed_fused(model, processor, [row["image"]] * len(texts), [prompt + text for text in texts])
        regions = embed_regions(model, processor, [row["image"]], [row["boxes"]])
        found = similarity(queries, regions).argmax(dim=1).tolist()  # (instructions,)
        shown.append(
            {
                "file_name": row["file_name"],
                "regions": [{"box": box} for box in row["boxes"]],
                "instructions": [
                    {"text": one["text"], "found": box, "right": box == one["box"]}
                    for one, box in zip(row["instructions"], found, strict=True)
                ],
            }
        )
    return shown


def search_nested(gallery: Gallery, index: SearchIndex, count: int = 3) -> dict[str, Any] | None:
    """The same texts, answered from the same index with one vector of each image and with all of them.

    `budgets` has recall@1 of all captions among all images, twins included, with 1, 2, 4, ... and all vectors of a
    text and of an image; all are the first ones of what the index holds.
    """
    k = index.facts.settings.vectors
    if k is None:
        return None
    row_of = _rows_by_name(index)
    captions = [(text, {row_of[row["file_name"]]}) for row in gallery.rows for text in row["captions"]]
    texts, right = zip(*captions, strict=True)
    counts = [*(2**power for power in range((k - 1).bit_length())), k]
    vectors = torch.from_numpy(index.vectors.codec.decode(index.vectors.codes))  # (N, k, D)
    queries = embed_texts(index.model, index.processor, texts)  # (texts, k, D)
    budgets = recall_by_budget(queries, vectors, right, [(kept, kept) for kept in counts])

    def search(row: dict[str, Any]) -> dict[str, Any]:
        text, right = row["captions"][0], [row["file_name"]]
        hits = [show_hits(index.search(text, top=HITS, vectors=kept), right) for kept in sorted({1, k})]
        return {"text": text, "answers": hits}

    return {
        "texts": len(texts),
        "searches": [search(row) for row in gallery.crowded[:count]],
        "budgets": [
            {"vectors": budget.document_vectors, "bytes": budget.bytes_per_document, "recall": budget.recall}
            for budget in budgets
        ],
    }


def ask_index(gallery: Gallery, index: SearchIndex, image_accuracy: float, count: int = 4) -> dict[str, Any] | None:
    """All questions of the scenes, answered from what the index remembers of their images.

    `items` has those of the first images, answered from the images as well; `image_accuracy` is of all questions.
    """
    if index.facts.settings.memory is None:
        return None
    model, processor = index.model, index.processor
    row_of = _rows_by_name(index)
    turns = [(row["file_name"], turn) for row in gallery.rows for turn in row["qa"]]
    answers: list[str] = []
    for start in range(0, len(turns), BATCH_SIZE):
        file_names, batch = zip(*turns[start : start + BATCH_SIZE], strict=True)
        memory = index.memory([row_of[file_name] for file_name in file_names])  # (B, J, H)
        answers += answer_from_memory(model, processor, memory, [turn["question"] for turn in batch], ANSWER_TOKENS)

    items = []
    remaining = iter(answers)
    for row in (gallery.dataset[number] for number in range(count)):
        questions = [turn["question"] for turn in row["qa"]]
        seen = generate_answers(model, processor, [row["image"]] * len(questions), questions, ANSWER_TOKENS)
        judged = [
            {**turn, "memory": _judge(next(remaining), turn["answer"]), "image": _judge(answer, turn["answer"])}
            for turn, answer in zip(row["qa"], seen, strict=True)
        ]
        items.append({"file_name": row["file_name"], "turns": judged})
    return {
        "questions": len(turns),
        "memory_accuracy": answer_accuracy(answers, [turn["answer"] for _, turn in turns]),
        "image_accuracy": image_accuracy,
        "bytes": {
            "memory": index.memory([0]).nbytes,
            "file": sum((index.folder / name).stat().st_size for name in row_of) / len(row_of),
        },
        "items": items,
    }


def _judge(answer: str, truth: str) -> dict[str, Any]:
    return {"text": answer, "right": answer_accuracy([answer], [truth]) == 1}


def _has_prompt(model, name: str) -> bool:
    """Whether a model has this prompt, and embeds the images with texts that it is for."""
    return name in (model.config.prompts or {}) and "fused" in model.config.embedded_kinds


def _rows_by_name(index: SearchIndex) -> dict[str, int]:
    names: Sequence[str] = index.rows["file_name"]
    return {name: row for row, name in enumerate(names)}
