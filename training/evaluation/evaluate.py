"""A model measured on a set of images: retrieval, classification, captions, answers, regions and instructions."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch

from mmgem.late_interaction import similarity
from mmgem.training.data.rows import LANGUAGE_PREFIX, captions_of
from mmgem.training.data.skipped import SkippedLog, readable_rows
from mmgem.training.distributed import Share
from mmgem.training.evaluation.metrics import (
    CaptionJudge,
    Mean,
    agreement,
    bleu4,
    caption_variety,
    cider,
    pointing_hits,
    prior_accuracy,
    recall_at,
    retrieval_ranks,
    right_answers,
)
from mmgem.training.evaluation.row_outputs import (
    RowOutputs,
    RowPredictor,
    check_measurable,
    instructions_of,
    region_texts_of,
)
from mmgem.training.inference import CAPTION_TOKENS, embed_texts

RECALL_AT = (1, 5, 10)
Embed = Callable[[list[str]], torch.Tensor]
Figures = dict[str, Mean | float | None]


def evaluate_model(
    model,
    processor,
    dataset,
    batch_size: int = 64,
    max_new_tokens: int = CAPTION_TOKENS,
    samples: list[dict[str, Any]] | None = None,
    caption_judge: CaptionJudge | None = None,
    intervals: dict[str, tuple[float, float]] | None = None,
    skipped: SkippedLog | None = None,
) -> dict[str, float]:
    """Measures a model on rows of images; what the rows do not have is not measured. Cards quote the table.

    | metric | columns | what it is |
    |---|---|---|
    | `text_to_image_recall@k` | `captions` | every caption searches the images |
    | `image_to_text_recall@k` | `captions` | every image searches the captions; any of its own is right |
    | `fused_text_to_image_recall@1` | `captions` | captions search images that the language model embeds |
    | `long_text_to_image_recall@1` | `long_caption` | every long caption searches the images |
    | `zero_shot_accuracy` | `label` | among the labels of the rows, or the judge's classes if they are among these |
    | `caption_fidelity` | `captions` | generated captions that say just what a true one says, as the judge reads it |
    | `memory_caption_fidelity` | `captions` | as `caption_fidelity`, from the memory of the image alone |
    | `text_to_image_recall@k_LANGUAGE` | `captions_LANGUAGE` | as above, in another language, such as `captions_de` |
    | `image_to_text_recall@k_LANGUAGE` | `captions_LANGUAGE` | likewise |
    | `cider`, `bleu4` | `captions` | CIDEr-D and BLEU-4 of generated captions, by pycocoevalcap |
    | `caption_distinct` | `captions` | share of different captions among the generated ones |
    | `caption_most_repeated` | `captions` | share of the images that get the most frequent caption |
    | `caption_length` | `captions` | words of a generated caption |
    | `answer_accuracy` | `qa` | generated answers that are the right one but for case, punctuation and articles |
    | `answer_prior_accuracy` | `qa` | of the most frequent answer to questions that begin alike, without any image |
    | `memory_answer_accuracy` | `qa` | as `answer_accuracy`, from the memory of the image alone |
    | `region_recall@1` | `boxes`, `region_captions` | every region caption searches all regions of all images |
    | `region_in_image_recall@1` | `boxes`, `region_captions` | every region caption searches those of its own image |
    | `pointing_accuracy` | `boxes`, `region_captions` | captions of regions that the model sees in their box |
    | `pointing_center_accuracy` | `boxes`, `region_captions` | of pointing at the center, whatever is said |
    | `region_caption_fidelity` | `boxes`, `region_captions` | as `caption_fidelity`, for each box |
    | `instructed_region_accuracy` | `boxes`, `instructions` | an image with an instruction finds that of its boxes |
    | `composed_recall@1` | `edit`, `edited_image` | an image with the instruction finds the edited image |

    Recalls of images and texts are for k of 1, 5 and 10. A text that several images share is right for each of them;
    so is a region caption for regions of the same meaning, and for the same box. In its own image it counts where
    there are several boxes. In the pointing game every meaning counts once in an image, and any box of it is right; it
    points at [`mmgem.training.similarity_maps.SimilarityMap.peaks`].

    An instruction `{"text", "box"}` names a box by its number, and counts where the image has several boxes. An image
    with the instruction of its `edit` searches all images and all edited ones: itself is the nearest distractor. What
    bears the file name of the edited image is right as well. Instructions stand after the model's prompts "object"
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
        batch_size: Images or questions at a time; of texts, see `embed_texts`.
        max_new_tokens: The length at which a generated caption is cut.
        samples: If given, receives for each row `caption` and, with boxes, `region_captions`, as generated.
        caption_judge: The judge that tells right captions from wrong ones, such as
            [`mmgem.training.evaluation.scene_metrics.SCENE_JUDGE`]; without one, and with one that cannot read most
            of the captions of the rows, no `_fidelity` is measured.
        intervals: If given, receives for each recall, for `cider` and for answers a 95% confidence interval, by
            bootstrap over images.
        skipped: Where to note rows that are left out: they cannot be read, or their pictures cannot, they have not one
            image, or [`mmgem.training.data.rows.check_row`] refuses them, though not for boxes without captions. They
            are logged in any case.

    Returns:
        Metric name to value.

    Raises:
        ValueError: If there are fewer than two rows that can be read, so that there is nothing to choose from.
    """
    share = Share.for_model(model)
    # Captions of boxes are long to write, and of no use to anybody if nobody reads them.
    writes_regions = samples is not None
    predictor = RowPredictor(model, processor, batch_size, max_new_tokens, caption_judge, writes_regions)
    skipped = SkippedLog() if skipped is None else skipped
    rows = readable_rows(dataset, processor, skipped, check_measurable, share)
    outputs = [output for output in share.gather(predictor.predict(rows)) if output is not None]
    if len(outputs) < 2:
        raise ValueError(f"`dataset` has {len(outputs)} rows that can be read; expected 2 or more.")

    caption_judge = _fitting(caption_judge, outputs)
    embed = partial(_embed_texts, model, processor, share)
    figures = _caption_figures(outputs, embed, caption_judge)
    figures |= _language_figures(outputs, embed)
    figures |= _long_caption_figures(outputs, embed)
    figures |= _label_figures(outputs, embed, caption_judge)
    figures |= _answer_figures(outputs)
    figures |= _region_figures(outputs, caption_judge)
    figures |= _pointing_figures(outputs, caption_judge)
    figures |= _instruction_figures(outputs)
    figures |= _edit_figures(outputs)
    if samples is not None:
        samples += [{"caption": output.caption, "region_captions": output.region_captions} for output in outputs]
    if intervals is not None:
        intervals |= {name: value.interval() for name, value in figures.items() if isinstance(value, Mean)}
    return {name: float(value) for name, value in figures.items() if value is not None}


def _fitting(judge: CaptionJudge | None, outputs: Sequence[RowOutputs]) -> CaptionJudge | None:
    """The judge, if there is one and it fits the rows."""
    captions = [text for output in outputs for text in captions_of(output.row)[:1]]
    regions = [text for output in outputs for text in region_texts_of(output.row)]
    return judge if judge is not None and judge.fits(captions, regions) else None


def _recalls(name: str, ranks: torch.Tensor, images: Sequence[int], suffix: str = "") -> Figures:
    """Recall at each of `RECALL_AT`, of queries that are of these images."""
    numbers = torch.tensor(images)
    return {f"{name}_recall@{k}{suffix}": Mean(ranks < k, numbers) for k in RECALL_AT}


def _embed_texts(model, processor, share: Share, texts: list[str]) -> torch.Tensor:
    """(T, D) or (T, k, D), each process embedding its share of the texts."""
    own = list(share.of(texts))
    embeds = embed_texts(model, processor, own) if own else ()
    return torch.stack(share.gather([embed.clone() for embed in embeds]))


def _image_embeds(outputs: Sequence[RowOutputs]) -> torch.Tensor:
    return torch.stack([output.image_embed for output in outputs])


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

    def figures(self, image_embeds: torch.Tensor, suffix: str = "") -> Figures:
        """Recall of all images by texts, and of texts by images."""
        everywhere = range(len(self.texts_of_image))
        asked = [image for image, texts in enumerate(self.texts_of_image) for _ in texts]
        described = [image for image, texts in enumerate(self.texts_of_image) if texts]
        return {
            **_recalls("text_to_image", self.text_ranks(image_embeds, everywhere), asked, suffix),
            **_recalls("image_to_text", self.image_ranks(image_embeds), described, suffix),
        }

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


def _caption_figures(outputs: Sequence[RowOutputs], embed: Embed, judge: CaptionJudge | None) -> Figures:
    references = [captions_of(output.row) for output in outputs]
    if not any(references):
        return {}
    image_embeds = _image_embeds(outputs)
    texts = _Captions(references, embed)
    figures = texts.figures(image_embeds)
    described = [number for number, own in enumerate(references) if own]
    fused_embeds = [output.fused_embed for output in outputs if output.fused_embed is not None]
    if fused_embeds:
        fused_ranks = texts.text_ranks(torch.stack(fused_embeds), described)
        figures["fused_text_to_image_recall@1"] = recall_at(fused_ranks, 1)

    captions = [output.caption for output in outputs if output.caption is not None]
    originals = [references[number] for number in described]
    if judge is not None:
        figures["caption_fidelity"] = judge.caption_fidelity(captions, [first for first, *_ in originals])
    if captions:
        figures |= caption_variety(captions)
    if len(captions) > 1 and importlib.util.find_spec("pycocoevalcap"):
        figures |= {"cider": cider(captions, originals), "bleu4": bleu4(captions, originals)}
    recalled = [(one.memory_caption, captions_of(one.row)[0]) for one in outputs if one.memory_caption is not None]
    if judge is not None and recalled:
        figures["memory_caption_fidelity"] = judge.caption_fidelity(*zip(*recalled, strict=True))
    return figures


def _language_figures(outputs: Sequence[RowOutputs], embed: Embed) -> Figures:
    """Of every column `captions_LANGUAGE`."""
    columns = sorted({name for output in outputs for name in output.row if name.startswith(LANGUAGE_PREFIX)})
    figures: Figures = {}
    for column in columns:
        texts = [output.row.get(column) or [] for output in outputs]
        if any(texts):
            suffix = f"_{column.removeprefix(LANGUAGE_PREFIX)}"
            figures |= _Captions(texts, embed).figures(_image_embeds(outputs), suffix)
    return figures


def _long_caption_figures(outputs: Sequence[RowOutputs], embed: Embed) -> Figures:
    texts = [[output.row["long_caption"]] if output.row.get("long_caption") else [] for output in outputs]
    if not any(texts):
        return {}
    ranks = _Captions(texts, embed).text_ranks(_image_embeds(outputs), range(len(outputs)))
    return {"long_text_to_image_recall@1": recall_at(ranks, 1)}


def _label_figures(outputs: Sequence[RowOutputs], embed: Embed, judge: CaptionJudge | None) -> Figures:
    """The class of an image is that of the nearest prompt, among all that the judge has, or else among the labels."""
    labels = [output.row["label"] for output in outputs if output.row.get("label") is not None]
    if len(labels) < len(outputs):
        return {}
    if judge is not None and set(labels) <= set(judge.classes):
        classes, prompts = list(judge.classes), [judge.label_prompt(label) for label in judge.classes]
    else:
        classes = sorted(set(labels), key=str)  # some may be numbers
        prompts = [f"a picture of {label}" for label in classes]
    scores = similarity(_image_embeds(outputs), embed(prompts))  # (I, classes)
    return {"zero_shot_accuracy": agreement([classes[best] for best in scores.argmax(dim=1).tolist()], labels)}


def _answer_figures(outputs: Sequence[RowOutputs]) -> Figures:
    turns = [(image, turn) for image, output in enumerate(outputs) for turn in output.row.get("qa") or []]
    if not turns:
        return {}
    images, references = torch.tensor([image for image, _ in turns]), [turn["answer"] for _, turn in turns]
    answers = [answer for output in outputs for answer in output.answers]
    figures: Figures = {
        "answer_accuracy": Mean(right_answers(answers, references), images),
        "answer_prior_accuracy": prior_accuracy([turn["question"] for _, turn in turns], references),
    }
    if recalled := [answer for output in outputs for answer in output.memory_answers]:
        figures["memory_answer_accuracy"] = Mean(right_answers(recalled, references), images)
    return figures


def _region_figures(outputs: Sequence[RowOutputs], judge: CaptionJudge | None) -> Figures:
    """A region of the same meaning, and the same box, is right as well."""
    captioned = [output for output in outputs if region_texts_of(output.row)]
    if not captioned:
        return {}
    texts = [text for output in captioned for text in region_texts_of(output.row)]
    meanings = [_meaning(text, judge) for text in texts]
    images = [image for image, output in enumerate(captioned) for _ in region_texts_of(output.row)]
    boxes = [(image, *box) for image, output in enumerate(captioned) for box in output.row["boxes"]]
    places: dict[Hashable, set[int]] = defaultdict(set)
    for region, names in enumerate(zip(meanings, boxes, strict=True)):
        for name in names:
            places[name].add(region)
    right = [places[meaning] | places[box] for meaning, box in zip(meanings, boxes, strict=True)]
    region_embeds = torch.cat([output.region_embeds for output in captioned])
    text_embeds = torch.cat([output.region_text_embeds for output in captioned])
    figures: Figures = {
        "region_recall@1": Mean(retrieval_ranks(text_embeds, region_embeds, right) < 1, torch.tensor(images))
    }
    in_image, asked, first = [], [], 0
    for image, output in enumerate(captioned):
        own = range(first, first + len(region_texts_of(output.row)))
        first = own.stop
        if len(own) > 1:
            own_right = [{region - own.start for region in right[query] if region in own} for query in own]
            in_image.append(retrieval_ranks(text_embeds[own.start : own.stop], output.region_embeds, own_right))
            asked += [image] * len(own)
    if in_image:
        figures["region_in_image_recall@1"] = Mean(torch.cat(in_image) < 1, torch.tensor(asked))
    written = [output for output in captioned if output.region_captions]
    if judge is not None and written:
        captions = [caption for output in written for caption in output.region_captions]
        said = [text for output in written for text in region_texts_of(output.row)]
        figures["region_caption_fidelity"] = judge.region_caption_fidelity(captions, said)
    return figures


def _meaning(text: str, judge: CaptionJudge | None) -> Hashable:
    return (judge and judge.parse_region_caption(text)) or text.lower()


def _pointing_figures(outputs: Sequence[RowOutputs], judge: CaptionJudge | None) -> Figures:
    """Each meaning points once in its image, and wherever it has a box there is right."""
    points: list[torch.Tensor] = []
    right: list[list] = []
    centers, images = [], []
    for image, output in enumerate(outputs):
        if output.region_points is None or output.center is None:
            continue
        boxes: dict[Hashable, list] = defaultdict(list)
        point_of: dict[Hashable, torch.Tensor] = {}
        for text, box, point in zip(
            region_texts_of(output.row), output.row["boxes"], output.region_points, strict=True
        ):
            meaning = _meaning(text, judge)
            boxes[meaning].append(box)
            point_of.setdefault(meaning, point)
        points += point_of.values()
        right += boxes.values()
        centers += [output.center] * len(boxes)
        images += [image] * len(boxes)
    if not points:
        return {}
    numbers = torch.tensor(images)
    return {
        "pointing_accuracy": Mean(pointing_hits(torch.stack(points), right), numbers),
        "pointing_center_accuracy": Mean(pointing_hits(torch.tensor(centers), right), numbers),
    }


def _instruction_figures(outputs: Sequence[RowOutputs]) -> Figures:
    ranks = [
        retrieval_ranks(
            output.instruction_embeds, output.region_embeds, [{one["box"]} for one in instructions_of(output.row)]
        )
        for output in outputs
        if output.instruction_embeds is not None
    ]
    return {"instructed_region_accuracy": recall_at(torch.cat(ranks), 1)} if ranks else {}


def _edit_figures(outputs: Sequence[RowOutputs]) -> Figures:
    """The image that is edited is a distractor like all others, and the nearest one."""
    edited = [output for output in outputs if output.edit_embed is not None]
    if not edited:
        return {}
    queries = torch.stack([output.edit_embed for output in edited])
    gallery = torch.stack([output.image_embed for output in outputs] + [output.twin_embed for output in edited])
    twin_names = [output.row["edit"].get("file_name") for output in edited]
    # Where the edited image is a row as well, or comes of several edits, each copy of it is right.
    places: dict[str | None, set[int]] = defaultdict(set)
    for place, name in enumerate([output.row.get("file_name") for output in outputs] + twin_names):
        places[name].add(place)
    right = [
        {len(outputs) + number} | (set() if name is None else places[name]) for number, name in enumerate(twin_names)
    ]
    return {"composed_recall@1": recall_at(retrieval_ranks(queries, gallery, right), 1)}
