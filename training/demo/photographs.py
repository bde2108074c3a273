"""The part of a demonstration about photographs of which nothing is known: no captions, no boxes, no right answers."""

import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mmgem.training.data.image_files import ImageFile, ImageReader, Skipped, apply_to_batch, shorter_side_for
from mmgem.training.demo.gallery import HITS
from mmgem.training.evaluation.caption_words import caption_words
from mmgem.training.inference import ANSWER_TOKENS, classify, generate_answers, generate_captions
from mmgem.training.printable import printable
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.row_search import Hit

logger = logging.getLogger(__name__)

SAMPLE = 48  # photographs that are captioned, evenly over the folder
BATCH_SIZE = 16
REGION_GRID = 3  # each photograph is searched in so many rows and columns of regions, too
WORDS = 6  # that are searched for
QUESTIONS = ("what is shown?", "what color is it?")
# Photographs that other packages install with themselves, all of them free.
FREE_PHOTOGRAPHS = {
    "skimage": [
        *("data/astronaut.png", "data/brick.png", "data/camera.png", "data/chelsea.png", "data/clock_motion.png"),
        *("data/coffee.png", "data/coins.png", "data/grass.png", "data/gravel.png", "data/hubble_deep_field.jpg"),
        *("data/moon.png", "data/motorcycle_left.png", "data/rocket.jpg"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}
# Words of captions that say nothing of what is shown.
_FUNCTION_WORDS = set(
    "about above after all along also among and another are around away back been before behind being below beside "
    "between big both but can down each for from front front has have her his holding how image into its large left "
    "like little looking many middle near next nobody not of off one onto other out over people photo picture right "
    "she showing side sitting small some someone something standing than that the their them there these they this "
    "those three through top toward towards two under very wearing what where which while who with".split()
)


def copy_free_photographs(folder: Path) -> int:
    """Copies the free photographs of those packages that are installed, and returns how many there are."""
    count = 0
    for package, names in FREE_PHOTOGRAPHS.items():
        spec = find_spec(package)
        for place in spec.submodule_search_locations or [] if spec else []:
            for file in (Path(place) / name for name in names):
                if file.is_file():
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, folder / file.name)
                    count += 1
    return count


def show_photographs(
    folder: str | Path,
    model,
    processor,
    index_folder: Path,
    labels: Sequence[str] = (),
    questions: Sequence[str] = (),
) -> dict[str, Any]:
    """Indexes a folder of photographs, and shows on it what a model can do.

    Args:
        folder: Where the photographs are, at any depth.
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        index_folder: A new folder for the index.
        labels: Classes to choose from for each photograph; by default the words that are searched for.
        questions: Asked about some photographs; by default `QUESTIONS`.

    Returns:
        What `demo.json` has of it. A heat map is the shares of patches, and the part of the picture that they cover.

    Raises:
        FileNotFoundError, ValueError: As `build_index`.
    """
    report = build_index(folder, model, processor, index_folder, regions=REGION_GRID)
    index = SearchIndex.load(index_folder, model, processor)
    kinds, names = index.rows.table["kind"].to_pylist(), index.rows.table["file_name"].to_pylist()
    names = [name for name, kind in zip(names, kinds, strict=True) if kind == "image"]
    sample = names[:: math.ceil(len(names) / SAMPLE)]
    skipped: list[Skipped] = [*report.skipped]
    files: list[ImageFile] = []
    captions: dict[str, str] = {}
    for batch in ImageReader(folder, shorter_side_for(processor)).read_batches(sample, BATCH_SIZE, skipped):
        for file, caption in apply_to_batch(lambda some: _caption(model, processor, some), batch, skipped):
            files.append(file)
            captions[file.file_name] = caption
    for file_name, reason in skipped:
        logger.warning("left out %s", printable(f"{file_name}: {reason}"))
    words = suggest_words(list(captions.values()), WORDS)
    labels = list(labels) or words
    return {
        "images": len(names),
        "skipped": [one._asdict() for one in skipped],
        "bytes": report.bytes_per_image,
        "first": sample[:24],
        "searches": [_search(index, word) for word in words],
        "image_searches": _search_by_image(index, sample) if len(names) > 1 else [],
        "region_searches": [_search_regions(index, word) for word in words[: WORDS // 2]],
        "captions": [{"file_name": name, "caption": caption} for name, caption in captions.items()][:24],
        "labels": labels,
        "classified": _classify(model, processor, files[:8], labels) if labels else [],
        "asked": _ask(model, processor, files[:6], list(questions) or list(QUESTIONS)),
    }


def suggest_words(captions: Sequence[str], count: int) -> list[str]:
    """Words to search for: those that many captions have, but not nearly all, the most telling first.

    Args:
        captions: One caption for each photograph.
        count: The most words.

    Returns:
        Words of three letters or more, without numbers and function words; fewer where captions have fewer.
    """
    frequencies: Counter[str] = Counter()
    for caption in captions:
        frequencies.update(
            list(dict.fromkeys(caption_words(caption).split()))
        )  # each once, in the order of the caption
    telling = {
        word: shown * math.log(len(captions) / shown + 1)
        for word, shown in frequencies.items()
        if len(word) > 2 and word.isalpha() and word not in _FUNCTION_WORDS and (shown < len(captions) or shown == 1)
    }
    return sorted(telling, key=lambda word: telling[word], reverse=True)[:count]


def _caption(model, processor, files: Sequence[ImageFile]) -> list[str]:
    return [as_prose(text) for text in generate_captions(model, processor, [file.image for file in files])]


def as_prose(caption: str) -> str:
    """Return a caption as people write it: Flickr8k, and models of it, put a space before stops."""
    return re.sub(r"\s+([.,;:!?])", r"\1", caption)


def _shown(index: SearchIndex, hit: Hit) -> dict[str, Any]:
    name = index.rows.table["file_name"][hit.row].as_py()
    box = {} if hit.box is None else {"box": hit.box}
    return {"file_name": name, "score": hit.score, "right": False, **box}


def _search(index: SearchIndex, text: str) -> dict[str, Any]:
    """The photographs nearest to a text, with a heat map over each that says why."""
    hits = index.search(text, top=HITS, kinds=["image"])
    search: dict[str, Any] = {"text": text, "hits": [_shown(index, hit) for hit in hits], "maps": []}
    if index.model.config.has_memory:  # else the language model reads images, of which there is no map
        query = index.query(text)
        for hit, shown in zip(hits, search["hits"], strict=True):
            picture, similarity_map = index.explain(hit.row, query)
            part = torch.tensor(similarity_map.box) / torch.tensor([*picture.size, *picture.size])
            shares = similarity_map.shares[0].tolist()
            search["maps"].append({"file_name": shown["file_name"], "shares": shares, "part": part.tolist()})
    return search


def _search_by_image(index: SearchIndex, sample: Sequence[str], count: int = 3) -> list[dict[str, Any]]:
    """Some photographs, and the nearest other ones."""
    searches = []
    for name in sample[:: math.ceil(len(sample) / count)]:
        hits = index.search(image=index.folder / name, top=HITS + 1, kinds=["image"])
        others = [shown for hit in hits if (shown := _shown(index, hit))["file_name"] != name][:HITS]
        searches.append({"file_name": name, "hits": others})
    return searches


def _search_regions(index: SearchIndex, text: str) -> dict[str, Any]:
    """The regions of all photographs that are nearest to a text."""
    hits = index.search(text, top=HITS, kinds=["region"])
    return {"text": text, "hits": [_shown(index, hit) for hit in hits]}


def _classify(model, processor, files: Sequence[ImageFile], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The most probable of the labels for each photograph."""
    prompts = [f"a picture of {label}" for label in labels]
    images = [file.image for file in files]
    best = classify(model, processor, images, prompts).topk(min(3, len(labels)))
    return [
        {
            "file_name": file.file_name,
            "guesses": [
                {"label": labels[number], "probability": value} for value, number in zip(values, numbers, strict=True)
            ],
        }
        for file, values, numbers in zip(files, best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _ask(model, processor, files: Sequence[ImageFile], questions: Sequence[str]) -> list[dict[str, Any]]:
    """What the model answers about each photograph."""
    asked = []
    for file in files:
        answers = generate_answers(model, processor, [file.image] * len(questions), questions, ANSWER_TOKENS)
        turns = [{"question": text, "answer": answer} for text, answer in zip(questions, answers, strict=True)]
        asked.append({"file_name": file.file_name, "turns": turns})
    return asked
