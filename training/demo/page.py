"""The results of a demonstration as one HTML page that needs no other file: pictures are written into it."""

import base64
import math
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mmgem.processing.image_loading import load_image
from mmgem.training.similarity_maps import SimilarityMap

TEMPLATE = "page.html.jinja"
PICTURE_SIZE = 288  # longer side, pixels: sharp on a dense screen at the sizes of the page

# Figure: its name for a person, what it says, and how it is written.
FIGURES = {
    "text_to_image_recall@1": ("Text → image, recall@1", "captions whose image comes first", "{:.1%}"),
    "text_to_image_recall@5": ("Text → image, recall@5", "captions whose image is among the first five", "{:.1%}"),
    "text_to_image_recall@10": ("Text → image, recall@10", "captions whose image is among the first ten", "{:.1%}"),
    "image_to_text_recall@1": ("Image → text, recall@1", "images for which a caption of theirs comes first", "{:.1%}"),
    "image_to_text_recall@5": ("Image → text, recall@5", "… is among the first five", "{:.1%}"),
    "image_to_text_recall@10": ("Image → text, recall@10", "… is among the first ten", "{:.1%}"),
    "long_text_to_image_recall@1": (
        "Long text → image, recall@1",
        "texts of over 100 words, told apart only at their end, whose image comes first",
        "{:.1%}",
    ),
    "fused_text_to_image_recall@1": (
        "Text → image through the language model",
        "captions whose image comes first where the language model reads the images as well",
        "{:.1%}",
    ),
    "composed_recall@1": (
        "Image and edit → image, recall@1",
        "images with an instruction, for which the edited image comes before all others, themselves included",
        "{:.1%}",
    ),
    "zero_shot_accuracy": ("Zero-shot accuracy", "images whose class, out of 64, comes first", "{:.1%}"),
    "caption_fidelity": ("Caption fidelity", "captions that name every object rightly, and no other", "{:.1%}"),
    "cider": ("CIDEr", "agreement with the reference captions in wording; 0 to 10", "{:.2f}"),
    "bleu4": ("BLEU-4", "the same, by sequences of up to four words", "{:.2f}"),
    "caption_distinct": ("Different captions", "different ones among the captions", "{:.1%}"),
    "caption_most_repeated": ("Most repeated caption", "images that have the most frequent caption", "{:.1%}"),
    "caption_length": ("Length of captions", "words of a caption", "{:.1f}"),
    "memory_caption_fidelity": (
        "Caption fidelity, from memory",
        "the same, where of the image there are only the states that the index keeps",
        "{:.1%}",
    ),
    "answer_accuracy": ("Answers", "questions about images that are answered rightly", "{:.1%}"),
    "memory_answer_accuracy": (
        "Answers, from memory",
        "the same, where of the image there are only the states that the index keeps",
        "{:.1%}",
    ),
    "answer_prior_accuracy": (
        "Answers without the image",
        "questions that are answered rightly by the most frequent answer to questions that begin alike",
        "{:.1%}",
    ),
    "region_recall@1": (
        "Text → region, recall@1",
        "texts whose region, of all images' regions, comes first",
        "{:.1%}",
    ),
    "region_in_image_recall@1": (
        "Text → region of its image, recall@1",
        "texts whose region comes first among those of its own image",
        "{:.1%}",
    ),
    "pointing_accuracy": (
        "Text → place in its image",
        "texts of regions that the model sees in their box, by the shares of patches",
        "{:.1%}",
    ),
    "pointing_center_accuracy": ("Center → place", "the same for pointing at the center, whatever is said", "{:.1%}"),
    "region_caption_fidelity": ("Region caption fidelity", "captions of regions that are right in all", "{:.1%}"),
    "instructed_region_accuracy": (
        "Image and instruction → region",
        "instructions that name one of several objects and find its region among those of the image",
        "{:.1%}",
    ),
}
# Shown only beside the results of what they measure, which a checkpoint may not have been trained for.
BESIDE = {
    "composed_recall@1": "edit_searches",
    "instructed_region_accuracy": "instructed",
    "fused_text_to_image_recall@1": "asked",
    "memory_caption_fidelity": "asked",
    "memory_answer_accuracy": "asked",
}
HEADLINES = ("text_to_image_recall@1", "zero_shot_accuracy", "caption_fidelity", "region_caption_fidelity")


def render_page(results: dict[str, Any], *folders: str | Path) -> str:
    """Renders the page as HTML.

    Args:
        results: The results that `run_demo` collects; its `demo.json` is an example.
        folders: The folders of the images that `results` names, by names that differ.

    Returns:
        The source of the page.
    """

    @cache
    def load(file_name: str) -> Image.Image:
        return load_image(next(file for folder in folders if (file := Path(folder) / file_name).is_file()))

    @cache
    def picture(file_name: str) -> dict[str, Any]:
        image = load(file_name)
        return {"uri": data_uri(image), "width": image.width, "height": image.height}

    def heat(found: dict[str, Any]) -> str:
        image = load(found["file_name"])
        x0, y0, x1, y1 = found["part"]
        box = (x0 * image.width, y0 * image.height, x1 * image.width, y1 * image.height)
        return data_uri(SimilarityMap(torch.tensor([found["shares"]]), box).draw(image))

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    figures = [
        {"name": name, "title": title, "meaning": meaning, "value": form.format(results["figures"][name])}
        for name, (title, meaning, form) in FIGURES.items()
        if name in results["figures"] and (name not in BESIDE or results[BESIDE[name]])
    ]
    nested = results.get("nested")
    headlines = [figure for figure in figures if figure["name"] in HEADLINES]
    return templates.get_template(TEMPLATE).render(
        **results | {"figures": figures},
        measured=results["figures"],
        headlines=headlines,
        curve=nested and budget_curve(nested["budgets"]),
        picture=picture,
        heat=heat,
    )


def budget_curve(budgets: list[dict[str, Any]], width: int = 480, height: int = 160) -> list[tuple[float, float]]:
    """The points of recall against bytes, each doubling of the bytes as wide as the last.

    Args:
        budgets: Of each its `bytes`, growing, and its `recall`, 0 to 1.
        width, height: Of the plot, in which recall 0 is at its lower edge, and 1 at its upper one.

    Returns:
        x, y of each budget; y grows downward.
    """
    places = [math.log2(budget["bytes"]) for budget in budgets]
    scale = width / (places[-1] - places[0] or 1)
    return [
        ((place - places[0]) * scale, height * (1 - budget["recall"]))
        for place, budget in zip(places, budgets, strict=True)
    ]


def data_uri(image: Image.Image) -> str:
    """A picture, enlarged or reduced to `PICTURE_SIZE`, as a `data:` URI."""
    scale = PICTURE_SIZE / max(image.size)
    size = math.ceil(image.width * scale), math.ceil(image.height * scale)
    file = BytesIO()
    image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(file, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
