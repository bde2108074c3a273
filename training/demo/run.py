"""The demonstration: everything one checkpoint does, on a folder of pictures, as one HTML page.

Of a folder of photographs nothing is known, see `photographs`. Without one there are free photographs, and a gallery
of scenes of a seed that no recipe trains on, so that the page can say for each answer whether it is right.

Nothing on it is picked by its outcome: each section takes scenes by their order in the gallery. Sections about
something that a checkpoint does not have, such as several vectors, prompts or a memory, are left out; see
`embedding_modes`.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmgem.late_interaction import similarity
from mmgem.training.captioning import caption_folder
from mmgem.training.demo.embedding_modes import ask_index, follow_instructions, search_edits, search_nested
from mmgem.training.demo.gallery import HITS, SEED, Gallery, show_hits
from mmgem.training.demo.page import render_page
from mmgem.training.demo.photographs import copy_free_photographs, show_photographs
from mmgem.training.evaluation.evaluate import evaluate_model
from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE
from mmgem.training.inference import classify, embed_regions, embed_texts
from mmgem.training.json_text import to_json
from mmgem.training.output_lock import one_writer
from mmgem.training.scenes.caption_parser import parse_caption, parse_region_caption
from mmgem.training.scenes.captions import label_prompt
from mmgem.training.scenes.dataset import write_scene_folder
from mmgem.training.scenes.drawing import LABELS, Look
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex

PAGE_FILE, RESULTS_FILE = "index.html", "demo.json"
BATCH_SIZE = 64


@one_writer
def run_demo(
    out: str | Path,
    model,
    processor,
    count: int = 500,
    folder: str | Path | None = None,
    labels: Sequence[str] = (),
    questions: Sequence[str] = (),
    shows_photographs: tuple[Any, Any] | None = None,
) -> tuple[Path, dict[str, float]]:
    """Runs everything on pictures, and leaves a page about it.

    Args:
        out: A new or empty folder, or one with an earlier demo, which is replaced. It receives `demo.json` (what the
            page shows), `index.html` and `photograph_index/`; without `folder` also `photographs/`, `gallery/` (images
            and `metadata.jsonl`), `index/` and `captions.jsonl`.
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        count: Scenes in the gallery; most come with a twin that differs in one detail.
        folder: Photographs, at any depth. By default scenes, and the free photographs of other packages.
        labels, questions: As for `show_photographs`.
        shows_photographs: Another model, with its processor, for photographs; by default the same for all pictures.

    Returns:
        The page, and the figures of `evaluate_model` on the scenes.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileExistsError: If `out` holds something else.
        FileNotFoundError, ValueError: If `folder` is not there, has no pictures, or is where `out` is, or if a label
            or a question is empty.
    """
    out = Path(out)
    for name, texts in (("labels", labels), ("questions", questions)):
        if not all(text.strip() for text in texts):
            raise ValueError(f"`{name}` is {list(texts)}; expected texts that are not empty.")
    if folder is not None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"`folder` is {str(folder)!r}, which is no folder; expected photographs.")
        if folder.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"`folder` is {str(folder)!r}, in `out`, which is replaced; expected it elsewhere.")
    _make_room(out)
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] = time.perf_counter() - start
        return result

    results: dict[str, Any] = {
        "model": {
            "name": Path(model.name_or_path).name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "seconds": seconds,
        "gallery": None,
        "figures": {},
        "photographs": None,
    }
    folders, photographs = [], folder or out / "photographs"
    if folder is None:
        folders.append(timed("drawing", write_scene_folder, out / "gallery", SEED, count))
        results |= _show_scenes(out, folders[0], count, model, processor, timed)
    if folder is not None or copy_free_photographs(photographs):
        folders.append(photographs)
        index, pair = out / "photograph_index", shows_photographs or (model, processor)
        shown = timed("photographs", show_photographs, photographs, *pair, index, labels, questions)
        results["photographs"] = shown | {"model": Path(pair[0].name_or_path).name}
    results["images"] = sum(results[part]["images"] for part in ("gallery", "photographs") if results[part])
    (out / RESULTS_FILE).write_text(to_json(results, indent=1), encoding="utf-8")
    (out / PAGE_FILE).write_text(render_page(results, *folders), encoding="utf-8")
    return out / PAGE_FILE, results["figures"]


def _show_scenes(out: Path, folder: Path, count: int, model, processor, timed: Callable) -> dict[str, Any]:
    """Everything on the gallery of scenes in a folder, whose right answers are known."""
    has_memory = model.config.num_embedding_tokens > 1  # a single state carries a vector, and is trained for no more
    report = timed("indexing", build_index, folder, model, processor, out / "index", memory=has_memory)
    timed("captioning", caption_folder, folder, model, processor, out / "captions.jsonl", with_boxes=True)
    gallery = Gallery.read(folder, count)
    figures = timed("measuring", evaluate_model, model, processor, gallery.dataset, caption_judge=SCENE_JUDGE)

    index = SearchIndex.load(out / "index", model, processor)
    with open(out / "captions.jsonl", encoding="utf-8") as lines:
        captions = {line["file_name"]: line for line in map(json.loads, lines)}
    return {
        "gallery": {"scenes": count, "images": report.images, "first": gallery.file_names[:24]},
        "figures": figures,
        "text_searches": _search_by_text(gallery, index),
        "image_searches": _search_by_image(gallery, index),
        "edit_searches": search_edits(gallery, index),
        "instructed": follow_instructions(gallery, model, processor),
        "nested": timed("comparing budgets", search_nested, gallery, index),
        "asked": timed("asking", ask_index, gallery, index, figures["answer_accuracy"]),
        "classified": _classify(gallery, model, processor),
        "captions": _judge_captions(gallery, captions),
        "regions": _judge_regions(gallery, captions),
        "region_searches": _search_regions(gallery, model, processor),
    }


def _make_room(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / RESULTS_FILE).is_file():
            raise FileExistsError(
                f"`out` is {str(out)!r}, with something else in it; expected a new folder or a demo's."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_FILE).write_text("{}")  # what makes the folder a demo's, should this run be killed


def _search_by_text(gallery: Gallery, index: SearchIndex) -> list[dict[str, Any]]:
    """A few captions, of which one image is right; a class, of which several are; and a long caption."""
    *some, other = gallery.crowded[:4]
    label = gallery.rows[0]["label"]
    searches = [
        *(("caption", row["captions"][0], [row["file_name"]]) for row in some),
        ("class", label_prompt(label), [name for name, scene in gallery.scenes.items() if scene.label == label]),
        ("long caption", other["long_caption"], [other["file_name"]]),
    ]
    return [
        {"kind": kind, "text": text, "hits": show_hits(index.search(text, top=HITS), right)}
        for kind, text, right in searches
    ]


def _search_by_image(gallery: Gallery, index: SearchIndex) -> list[dict[str, Any]]:
    """Images whose twin is in the gallery; the nearest other image should be the twin."""
    searches = []
    for row in gallery.edited[:3]:
        hits = index.search(image=index.folder / row["file_name"], top=HITS + 1)
        others = [hit for hit in hits if hit.path.name != row["file_name"]][:HITS]
        searches.append(
            {
                "file_name": row["file_name"],
                "instruction": row["edit"]["instruction"],
                "hits": show_hits(others, [row["edit"]["file_name"]]),
            }
        )
    return searches


def _classify(gallery: Gallery, model, processor, count: int = 6) -> list[dict[str, Any]]:
    """The three most probable of all classes for the first images."""
    rows = [gallery.dataset[number] for number in range(count)]
    prompts = [label_prompt(label) for label in LABELS]
    best = classify(model, processor, [row["image"] for row in rows], prompts).topk(3)
    return [
        {
            "file_name": row["file_name"],
            "label": row["label"],
            "guesses": [
                {"label": LABELS[number], "probability": value, "right": LABELS[number] == row["label"]}
                for value, number in zip(values, numbers, strict=True)
            ],
        }
        for row, values, numbers in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _judge_captions(gallery: Gallery, captions: dict[str, dict], count: int = 12) -> list[dict[str, Any]]:
    """Generated captions of the first images; right is one that speaks of exactly the objects there are."""
    return [
        {
            "file_name": row["file_name"],
            "caption": captions[row["file_name"]]["caption"],
            "truth": row["captions"][0],
            "right": parse_caption(captions[row["file_name"]]["caption"])
            == frozenset(gallery.scenes[row["file_name"]].objects),
        }
        for row in gallery.rows[:count]
    ]


def _judge_regions(gallery: Gallery, captions: dict[str, dict], count: int = 6) -> list[dict[str, Any]]:
    """Generated captions of the boxes of the last images with three objects or more."""
    return [
        {
            "file_name": row["file_name"],
            "regions": [
                {"box": box, "caption": caption, "truth": truth, "right": parse_region_caption(caption) == item.look}
                for box, caption, truth, item in zip(
                    row["boxes"],
                    captions[row["file_name"]]["region_captions"],
                    row["region_captions"],
                    gallery.scenes[row["file_name"]].objects,
                    strict=True,
                )
            ],
        }
        for row in gallery.crowded[-count:]
    ]


def _search_regions(gallery: Gallery, model, processor, count: int = 4) -> list[dict[str, Any]]:
    """Texts that look for one object among all regions of all images."""
    regions: list[tuple[str, list[float], Look]] = []
    parts = []
    for start in range(0, len(gallery.dataset), BATCH_SIZE):
        rows = [gallery.dataset[row] for row in range(start, min(start + BATCH_SIZE, len(gallery.dataset)))]
        parts.append(embed_regions(model, processor, [row["image"] for row in rows], [row["boxes"] for row in rows]))
        for row in rows:
            objects = gallery.scenes[row["file_name"]].objects
            regions += [(row["file_name"], box, item.look) for box, item in zip(row["boxes"], objects, strict=True)]
    queries = [row["region_captions"][-1] for row in gallery.rows[:count]]
    scores = similarity(embed_texts(model, processor, queries), torch.cat(parts))  # (queries, regions)
    scores, numbers = scores.topk(HITS)  # (queries, HITS) each
    searches = []
    for query, row_scores, row_numbers in zip(queries, scores.tolist(), numbers.tolist(), strict=True):
        wanted = parse_region_caption(query)
        found = [(score, *regions[number]) for score, number in zip(row_scores, row_numbers, strict=True)]
        hits = [
            {"file_name": name, "box": box, "score": score, "right": look == wanted}
            for score, name, box, look in found
        ]
        searches.append({"text": query, "hits": hits})
    return searches
