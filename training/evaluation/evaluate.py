"""What a model is worth on a set of images: retrieval, classification, captions, answers, regions and instructions."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch

from mmgem.late_interaction import similarity
from mmgem.training.data.rows import captions_of
from mmgem.training.distributed import Share
from mmgem.training.evaluation.metrics import (
    agreement,
    answer_accuracy,
    caption_fidelity,
    cider,
    recall_at,
    region_caption_fidelity,
    retrieval_ranks,
)
from mmgem.training.evaluation.row_outputs import Reading, RowReader, instructions_of, region_texts_of
from mmgem.training.inference import CAPTION_TOKENS, embed_texts
from mmgem.training.scenes.caption_parser import parse_region_caption
from mmgem.training.scenes.captions import label_prompt
from mmgem.training.scenes.drawing import LABELS

RECALL_AT = (1, 5, 10)
Embed = Callable[[list[str]], torch.Tensor]
Figures = dict[str, float | None]


def evaluate_model(
    model,
    processor,
    dataset,
    batch_size: int = 64,
    max_new_tokens: int = CAPTION_TOKENS,
    samples: list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Measures a model on rows of images; what the rows do not have is not measured.

    | metric | columns | what it is |
    |---|---|---|
    | `text_to_image_recall@k` | `captions` | every caption searches the images; k is 1, 5, 10 |
    | `image_to_text_recall@k` | `captions` | every image searches them (`logits_per_image`); any of its own is right |
    | `fused_text_to_image_recall@1` | `captions` | images with captions go through the language model |
    | `long_text_to_image_recall@1` | `long_caption` | |
    | `zero_shot_accuracy` | `label` | among all classes of scenes, or those of the rows if they have others |
    | `caption_fidelity` | `captions` | generated captions that speak of exactly the right objects (scenes only) |
    | `memory_caption_fidelity` | `captions` | as `caption_fidelity`, from the memory of the image alone |
    | `cider` | `captions` | of the generated captions; needs pycocoevalcap |
    | `answer_accuracy` | `qa` | generated answers that are the right one but for case, punctuation and articles |
    | `memory_answer_accuracy` | `qa` | as `answer_accuracy`, from the memory of the image alone |
    | `region_recall@1` | `boxes`, `region_captions` | every region caption searches all regions of all images |
    | `region_caption_fidelity` | `boxes`, `region_captions` | as `caption_fidelity`, for each box |
    | `instructed_region_accuracy` | `boxes`, `instructions` | an image with an instruction finds that of its boxes |
    | `composed_recall@1` | `edit`, `edited_image` | an image with the instruction finds the edited image |

    A text that several images share is right for each of them; so is a region caption for regions of the same meaning.

    An instruction `{"text", "box"}` names a box by its number, and counts where the image has several boxes. An image
    with the instruction of its `edit` searches all images and all edited ones: itself is the nearest distractor. What
    bears the file name of the edited image is right as well. Instructions stand behind the model's prompts "object"
    and "edit", where it has them.

    A model that reads a prompt in the place of [EMB] vectors has no memory, and sends all images through the language
    model: `fused_` and `memory_` figures are left out. For one that is calibrated for images and texts alone, `fused_`
    figures are, and those of instructions and edits. Boxes that the image processor crops away are left out.

    In a distributed run all processes call this with the same rows; each embeds and captions its share of them, and
    all return the metrics of the whole (see [`mmgem.training.distributed.Share`]).

    Args:
        model: An `MMGEMModel`, on any device; its training mode is the same afterwards.
        processor: Its `MMGEMProcessor`.
        dataset: Any iterable of rows: dicts with `image` and any of the columns above; a single caption may also be
            called `caption` or `text`.
        batch_size: Images, texts or questions at a time.
        max_new_tokens: The length at which a generated caption is cut.
        samples: If given, receives for each row `caption` and, with boxes, `region_captions`, as generated.

    Returns:
        Metric name to value.

    Raises:
        ValueError: If there are fewer than two rows, so that there is nothing to choose from, a row has not one image,
            not as many `boxes` as `region_captions`, a question without its answer, or an instruction for a box that
            is not there.
    """
    share = Share.for_model(model)
    reader = RowReader(model, processor, batch_size, max_new_tokens)
    readings = share.gather(reader.read(share.of(dataset)))
    if len(readings) < 2:
        raise ValueError(f"dataset must have 2 rows or more, got {len(readings)}")

    embed = partial(_embed_texts, model, processor, batch_size, share)
    figures = _caption_figures(readings, embed)
    figures |= _long_caption_figures(readings, embed)
    figures |= _label_figures(readings, embed)
    figures |= _answer_figures(readings)
    figures |= _region_figures(readings, embed)
    figures |= _instruction_figures(readings)
    figures |= _edit_figures(readings)
    if samples is not None:
        samples += [{"caption": reading.caption, "region_captions": reading.region_captions} for reading in readings]
    return {name: value for name, value in figures.items() if value is not None}


def _embed_texts(model, processor, batch_size: int, share: Share, texts: list[str]) -> torch.Tensor:
    """(T, D) or (T, k, D), each process embedding its share of the texts."""
    own = list(share.of(texts))
    embeds = embed_texts(model, processor, own, batch_size) if own else ()
    return torch.stack(share.gather([embed.clone() for embed in embeds]))


def _image_embeds(readings: Sequence[Reading]) -> torch.Tensor:
    return torch.stack([reading.image_embed for reading in readings])


class _Captions:
    """Texts that search images, and images that search texts.

    Args:
        texts_of_image: For each image its texts, or none. A text of several images is embedded once, and right for
            each of them.
        embed: Texts to embeddings.
    """

    def __init__(self, texts_of_image: Sequence[Sequence[str]], embed: Embed):
        self.texts_of_image = texts_of_image
        self.images_of_text: dict[str, set[int]] = defaultdict(set)
        for image, texts in enumerate(texts_of_image):
            for text in texts:
                self.images_of_text[text].add(image)
        self.number = {text: row for row, text in enumerate(self.images_of_text)}
        self.embeds = embed(list(self.number))  # (different texts, ...)

    def text_ranks(self, gallery: torch.Tensor, images: Sequence[int]) -> torch.Tensor:
        """Ranks of every text of every image among a gallery that shows `images`, by their numbers."""
        place = {image: row for row, image in enumerate(images)}
        right = [{place[image] for image in own} for own in self.images_of_text.values()]
        asked = [self.number[text] for texts in self.texts_of_image for text in texts]
        return retrieval_ranks(self.embeds, gallery, right)[torch.tensor(asked)]

    def image_ranks(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Ranks of every image that has texts among the different texts."""
        described = [image for image, texts in enumerate(self.texts_of_image) if texts]
        right = [{self.number[text] for text in self.texts_of_image[image]} for image in described]
        return retrieval_ranks(image_embeds[described], self.embeds, right, gallery_asks=True)


def _caption_figures(readings: Sequence[Reading], embed: Embed) -> Figures:
    references = [captions_of(reading.row) for reading in readings]
    if not any(references):
        return {}
    image_embeds, everywhere = _image_embeds(readings), range(len(readings))
    texts = _Captions(references, embed)
    text_ranks, image_ranks = texts.text_ranks(image_embeds, everywhere), texts.image_ranks(image_embeds)
    figures: Figures = {f"text_to_image_recall@{k}": recall_at(text_ranks, k) for k in RECALL_AT}
    figures |= {f"image_to_text_recall@{k}": recall_at(image_ranks, k) for k in RECALL_AT}
    described = [number for number, own in enumerate(references) if own]
    fused_embeds = [reading.fused_embed for reading in readings if reading.fused_embed is not None]
    if fused_embeds:
        fused_ranks = texts.text_ranks(torch.stack(fused_embeds), described)
        figures["fused_text_to_image_recall@1"] = recall_at(fused_ranks, 1)

    captions = [reading.caption for reading in readings if reading.caption is not None]
    originals = [references[number] for number in described]
    figures["caption_fidelity"] = caption_fidelity(captions, [first for first, *_ in originals])
    if len(captions) > 1 and importlib.util.find_spec("pycocoevalcap"):
        figures["cider"] = cider(captions, originals)
    recalled = [(one.memory_caption, captions_of(one.row)[0]) for one in readings if one.memory_caption is not None]
    if recalled:
        figures["memory_caption_fidelity"] = caption_fidelity(*zip(*recalled, strict=True))
    return figures


def _long_caption_figures(readings: Sequence[Reading], embed: Embed) -> Figures:
    texts = [[reading.row["long_caption"]] if reading.row.get("long_caption") else [] for reading in readings]
    if not any(texts):
        return {}
    ranks = _Captions(texts, embed).text_ranks(_image_embeds(readings), range(len(readings)))
    return {"long_text_to_image_recall@1": recall_at(ranks, 1)}


def _label_figures(readings: Sequence[Reading], embed: Embed) -> Figures:
    """The class of an image is that whose prompt is nearest, among all that scenes have, or else among the labels."""
    labels = [reading.row["label"] for reading in readings if reading.row.get("label") is not None]
    if len(labels) < len(readings):
        return {}
    classes = list(LABELS) if set(labels) <= set(LABELS) else sorted(set(labels))
    scores = similarity(_image_embeds(readings), embed([label_prompt(label) for label in classes]))  # (I, classes)
    return {"zero_shot_accuracy": agreement([classes[best] for best in scores.argmax(dim=1).tolist()], labels)}


def _answer_figures(readings: Sequence[Reading]) -> Figures:
    references = [turn["answer"] for reading in readings for turn in reading.row.get("qa") or []]
    written = {
        "answer_accuracy": [answer for reading in readings for answer in reading.answers],
        "memory_answer_accuracy": [answer for reading in readings for answer in reading.memory_answers],
    }
    return {name: answer_accuracy(answers, references) for name, answers in written.items() if answers}


def _region_figures(readings: Sequence[Reading], embed: Embed) -> Figures:
    """A region of the same meaning is right as well."""
    captioned = [reading for reading in readings if reading.region_captions]
    if not captioned:
        return {}
    texts = [text for reading in captioned for text in region_texts_of(reading.row)]
    meanings = [parse_region_caption(text) or text.lower() for text in texts]
    regions_of_meaning: dict[Hashable, set[int]] = defaultdict(set)
    for region, meaning in enumerate(meanings):
        regions_of_meaning[meaning].add(region)
    region_embeds = torch.cat([reading.region_embeds for reading in captioned])
    ranks = retrieval_ranks(embed(texts), region_embeds, [regions_of_meaning[meaning] for meaning in meanings])
    captions = [caption for reading in captioned for caption in reading.region_captions]
    fidelity = region_caption_fidelity(captions, texts)
    return {"region_recall@1": recall_at(ranks, 1), "region_caption_fidelity": fidelity}


def _instruction_figures(readings: Sequence[Reading]) -> Figures:
    ranks = [
        retrieval_ranks(
            reading.instruction_embeds, reading.region_embeds, [{one["box"]} for one in instructions_of(reading.row)]
        )
        for reading in readings
        if reading.instruction_embeds is not None
    ]
    return {"instructed_region_accuracy": recall_at(torch.cat(ranks), 1)} if ranks else {}


def _edit_figures(readings: Sequence[Reading]) -> Figures:
    """The image that is edited is a distractor like all others, and the nearest one."""
    edited = [reading for reading in readings if reading.edit_embed is not None]
    if not edited:
        return {}
    queries = torch.stack([reading.edit_embed for reading in edited])
    gallery = torch.stack([reading.image_embed for reading in readings] + [reading.twin_embed for reading in edited])
    twin_names = [reading.row["edit"].get("file_name") for reading in edited]
    # Where the edited image is a row as well, or comes of several edits, each copy of it is right.
    places: dict[str | None, set[int]] = defaultdict(set)
    for place, name in enumerate([reading.row.get("file_name") for reading in readings] + twin_names):
        places[name].add(place)
    right = [
        {len(readings) + number} | (set() if name is None else places[name]) for number, name in enumerate(twin_names)
    ]
    return {"composed_recall@1": recall_at(retrieval_ranks(queries, gallery, right), 1)}
