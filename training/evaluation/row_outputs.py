"""The outputs of a model for rows: embeddings of their images, and what it writes about them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch

from mmgem.processing.boxes import is_in_view, model_views
from mmgem.processing.image_loading import load_image
from mmgem.training.data.rows import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    captions_of,
    check_row,
    edit_of,
    images_of,
    row_name,
)
from mmgem.training.evaluation.metrics import CaptionJudge
from mmgem.training.inference import (
    ANSWER_TOKENS,
    answer_from_memory,
    embed_and_remember,
    embed_fused,
    embed_images,
    embed_regions,
    embed_texts,
    generate_answers,
    generate_region_captions,
    tower_runs_once,
)
from mmgem.training.progress import progress
from mmgem.training.similarity_maps import similarity_map

_PICTURES = (*IMAGE_COLUMNS, "edited_image")


@dataclass
class RowOutputs:
    """The outputs of a model for one row, beside the row's columns without its pictures, which would fill the RAM.

    An embedding is (D,) or (k, D); what the row has no columns for is None or empty.

    Args:
        row: The other columns.
        image_embed: Embedding of the image.
        caption: Caption of the image.
        fused_embed: Embedding of the image through the language model.
        memory_caption: Caption from the memory of the image alone, where captions can be judged.
        answers, memory_answers: Answers to the questions of `qa`, from the image and from its memory alone.
        region_embeds: (R, D) or (R, k, D) embeddings of the boxes.
        region_text_embeds: (R, D) or (R, k, D) embeddings of their captions in the row.
        region_points: (R, 2), the pixel x, y where the model sees most of each of these captions, see
            [`mmgem.training.similarity_maps.SimilarityMap.peaks`]; None for a model without similarity maps.
        center: The pixel x, y in the middle of the image.
        region_captions: Captions of the boxes.
        instruction_embeds: (N, D) or (N, k, D) embeddings of the image with each of its `instructions`.
        edit_embed: Embedding of the image with the instruction of its `edit`.
        twin_embed: Embedding of the edited image.
    """

    row: dict[str, Any]
    image_embed: torch.Tensor
    caption: str | None = None
    fused_embed: torch.Tensor | None = None
    memory_caption: str | None = None
    answers: list[str] = field(default_factory=list)
    memory_answers: list[str] = field(default_factory=list)
    region_embeds: torch.Tensor | None = None
    region_text_embeds: torch.Tensor | None = None
    region_points: torch.Tensor | None = None
    center: tuple[float, float] | None = None
    region_captions: list[str] = field(default_factory=list)
    instruction_embeds: torch.Tensor | None = None
    edit_embed: torch.Tensor | None = None
    twin_embed: torch.Tensor | None = None


def questions_of(row: Mapping[str, Any]) -> list[str]:
    """The questions of a row, or []."""
    return [turn["question"] for turn in row.get("qa") or []]


def region_texts_of(row: Mapping[str, Any]) -> list[str]:
    """The captions of a row's boxes, or []."""
    return row.get("region_captions") or []


def instructions_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The `instructions` of a row, each naming one of its boxes, or []; also where there is only one box to name."""
    return (row.get("instructions") or []) if len(row.get("boxes") or []) > 1 else []


def check_measurable(row: Mapping[str, Any], number: int) -> None:
    """Refuse a row that cannot be measured; see `evaluate_model`.

    Args:
        row: Its columns; images need not be loaded.
        number: Its number among all rows.

    Raises:
        ValueError: If `check_row` refuses it, or it has not one image.
    """
    name = row_name(row, number)
    filled = {column: value for column, value in row.items() if value or column not in CAPTION_COLUMNS}
    if isinstance(row.get("edit"), Mapping) and row["edit"].get("instruction") is None:  # as in a folder of scenes
        filled.pop("edited_image", None)
    check_row(filled, name, needs_region_captions=False)
    if len(images_of(row)) != 1:
        raise ValueError(f"{name} has {len(images_of(row))} images; expected one.")


class RowPredictor:
    """Embeds and writes all that the columns of rows allow, in batches.

    Args:
        model: An `MMGEMModel`, on any device; its training mode is the same afterwards.
        processor: Its `MMGEMProcessor`.
        batch_size: Images, questions or instructions at a time.
        max_new_tokens: The length at which a caption is cut; answers are cut at `ANSWER_TOKENS` at the latest.
        caption_judge: The judge of captions, as for `evaluate_model`; only what it can judge is written from memories.
        writes_regions: Whether captions of boxes are written that it cannot judge.
    """

    def __init__(
        self,
        model,
        processor,
        batch_size: int,
        max_new_tokens: int,
        caption_judge: CaptionJudge | None = None,
        writes_regions: bool = True,
    ):
        self.writes_regions = writes_regions
        self.model, self.processor, self.caption_judge = model, processor, caption_judge
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.max_answer_tokens = min(max_new_tokens, ANSWER_TOKENS)
        self.prompts = model.config.prompts or {}
        self.can_fuse = "fused" in model.config.embedded_kinds
        self._embed_of_text: dict[str, torch.Tensor] = {}  # captions of regions, which are often the same

    def predict(self, rows: Iterable[Mapping[str, Any] | None]) -> list[RowOutputs | None]:
        """Runs the model.

        Args:
            rows: Dicts that `check_measurable` has passed, or None for one that is left out.

        Returns:
            The outputs for each row, or None. No embedding shares the memory of its batch: it would be sent to other
            processes with all of it.

        Raises:
            ValueError: If a row cannot be measured, see `evaluate_model`.
        """
        outputs: list[RowOutputs | None] = []
        for rows_or_none in _batches(rows, self.batch_size):
            numbers = [number for number, row in enumerate(rows_or_none) if row is not None]
            batch = [self._visible(rows_or_none[number]) for number in numbers]
            images = [images_of(row)[0] for row in batch]
            columns = [{name: value for name, value in row.items() if name not in _PICTURES} for row in batch]
            with tower_runs_once(self.model):
                new = self._embed_images(columns, images)
                self._write_from_images(new, images)
                self._predict_regions(new, images)
                self._embed_edits(new, images, [edit_of(row) for row in batch])
            of_row = dict(zip(numbers, new, strict=True))
            outputs += [of_row.get(number) for number in range(len(rows_or_none))]
        return outputs

    def _visible(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Without the boxes that the image processor crops away, as in training, and without what is said of them."""
        image_processor = self.processor.image_processor
        if not row.get("boxes") or not getattr(image_processor, "do_center_crop", False):
            return row
        image = load_image(images_of(row)[0])
        height, width = image_processor([image], return_tensors="pt")["pixel_values"].shape[-2:]
        [view] = model_views(image_processor, [image.size], [(width, height)])
        seen = [number for number, box in enumerate(row["boxes"]) if is_in_view(box, view)]
        instructions = [
            {**one, "box": seen.index(one["box"])} for one in row.get("instructions") or [] if one["box"] in seen
        ]
        captions = row.get("region_captions") or []
        return {
            **row,
            "boxes": [row["boxes"][number] for number in seen],
            "region_captions": [captions[number] for number in seen] if captions else [],
            "instructions": instructions,
        }

    def _embed_images(self, rows: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[RowOutputs]:
        """Embeddings of the images and, where there is something to write about them, outputs from their memories."""
        # Where a prompt is read in the place of [EMB] vectors, there is no memory, and all images go through the
        # language model anyway.
        has_memory = self.model.config.has_memory
        told = [n for n, row in enumerate(rows) if has_memory and (captions_of(row) or questions_of(row))]
        others = [n for n in range(len(rows)) if n not in told]
        outputs: dict[int, RowOutputs] = {}
        if others:
            embeds = embed_images(self.model, self.processor, [images[n] for n in others])
            outputs |= {n: RowOutputs(rows[n], embed) for n, embed in zip(others, _rows_of(embeds), strict=True)}
        if told:
            states = embed_and_remember(self.model, self.processor, [images[n] for n in told])
            embeds = states.image_embeds
            outputs |= {n: RowOutputs(rows[n], embed) for n, embed in zip(told, _rows_of(embeds), strict=True)}
            if states.fused_embeds is not None:
                for n, fused_embed in zip(told, _rows_of(states.fused_embeds), strict=True):
                    outputs[n].fused_embed = fused_embed if captions_of(rows[n]) else None
            self._write_from_memories([outputs[n] for n in told], states.memory)
        return [outputs[n] for n in range(len(rows))]

    def _write_from_images(self, outputs: Sequence[RowOutputs], images: Sequence[Any]):
        """Captions and answers, from the images."""
        has_caption = [bool(captions_of(output.row)) for output in outputs]
        texts = self._write(generate_answers, images, outputs, has_caption)
        for output, (caption, answers) in zip(outputs, texts, strict=True):
            output.caption, output.answers = caption, answers

    def _write_from_memories(self, outputs: Sequence[RowOutputs], memories: torch.Tensor):
        """Captions and answers, from the memories (B, k, H) of the images."""
        has_caption = [self._is_judged(captions_of(output.row)) for output in outputs]
        texts = self._write(_answer_from_memories, list(memories), outputs, has_caption)
        for output, (caption, answers) in zip(outputs, texts, strict=True):
            output.memory_caption, output.memory_answers = caption, answers

    def _is_judged(self, captions: Sequence[str]) -> bool:
        judge = self.caption_judge
        return judge is not None and bool(captions) and judge.parse_caption(captions[0]) is not None

    def _is_written(self, region_texts: Sequence[str]) -> bool:
        if self.writes_regions or not region_texts:
            return bool(region_texts)
        judge = self.caption_judge
        return judge is not None and all(judge.parse_region_caption(text) is not None for text in region_texts)

    def _write(self, answer: Callable, sources: Sequence, outputs: Sequence[RowOutputs], has_caption: Sequence[bool]):
        """For each row a caption, if it has one, and its answers, all from its source, by the function `answer`."""
        answer = partial(answer, self.model, self.processor)
        nothing = [[""] if has_one else [] for has_one in has_caption]  # a caption answers the empty question
        captions = self._each(partial(answer, max_new_tokens=self.max_new_tokens), sources, nothing)
        questions = [questions_of(output.row) for output in outputs]
        answers = self._each(partial(answer, max_new_tokens=self.max_answer_tokens), sources, questions)
        return zip([next(iter(caption), None) for caption in captions], answers, strict=True)

    def _predict_regions(self, outputs: Sequence[RowOutputs], images: Sequence[Any]):
        """Embeddings and captions of boxes, and embeddings of the image with each instruction."""
        boxed = [n for n, one in enumerate(outputs) if region_texts_of(one.row) or instructions_of(one.row)]
        if boxed:
            boxes = [outputs[number].row["boxes"] for number in boxed]
            embeds = embed_regions(self.model, self.processor, [images[number] for number in boxed], boxes)
            for number, own_embeds in zip(boxed, embeds.split([len(own) for own in boxes]), strict=True):
                outputs[number].region_embeds = own_embeds.clone()
        self._point_at_regions([(outputs[n], images[n]) for n in boxed if region_texts_of(outputs[n].row)])
        captioned = [number for number in boxed if self._is_written(region_texts_of(outputs[number].row))]
        if captioned:
            boxes = [outputs[number].row["boxes"] for number in captioned]
            own_images = [images[number] for number in captioned]
            captions = iter(
                generate_region_captions(self.model, self.processor, own_images, boxes, self.max_new_tokens)
            )
            for number, own_boxes in zip(captioned, boxes, strict=True):
                outputs[number].region_captions = list(islice(captions, len(own_boxes)))

        if not self.can_fuse:
            return
        prompt = self.prompts.get("object", "")
        texts = [[prompt + one["text"] for one in instructions_of(output.row)] for output in outputs]
        for output, own_embeds in zip(outputs, self._each(self._embed, images, texts), strict=True):
            output.instruction_embeds = torch.stack(own_embeds) if own_embeds else None

    def _point_at_regions(self, shown: Sequence[tuple[RowOutputs, Any]]):
        """Embeddings of the captions of boxes, and where in their image each of them is seen."""
        texts = {text for output, _ in shown for text in region_texts_of(output.row)}
        if new := sorted(texts - self._embed_of_text.keys()):
            embeds = embed_texts(self.model, self.processor, new)
            self._embed_of_text |= dict(zip(new, _rows_of(embeds), strict=True))
        for output, image in shown:
            queries = torch.stack([self._embed_of_text[text] for text in region_texts_of(output.row)])
            output.region_text_embeds = queries
            if self.model.config.has_memory:  # else the language model reads the image
                picture = load_image(image)
                output.region_points = similarity_map(self.model, self.processor, picture, queries).peaks()
                output.center = picture.width / 2, picture.height / 2

    def _embed_edits(
        self, outputs: Sequence[RowOutputs], images: Sequence[Any], edits: Sequence[tuple[str, Any] | None]
    ):
        """Embeddings of the image with the instruction of its edit, and of the edited image."""
        edited = [(output, image, *edit) for output, image, edit in zip(outputs, images, edits, strict=True) if edit]
        if not edited or not self.can_fuse:
            return
        edited_outputs, own_images, instructions, twins = zip(*edited, strict=True)
        prompt = self.prompts.get("edit", "")
        edit_embeds = self._embed(own_images, [prompt + instruction for instruction in instructions])
        twin_embeds = _rows_of(embed_images(self.model, self.processor, twins))
        for output, edit_embed, twin_embed in zip(edited_outputs, edit_embeds, twin_embeds, strict=True):
            output.edit_embed, output.twin_embed = edit_embed, twin_embed

    def _embed(self, images: Sequence[Any], texts: Sequence[str]) -> list[torch.Tensor]:
        return _rows_of(embed_fused(self.model, self.processor, images, texts))

    def _each(self, function: Callable, sources: Sequence, texts: Sequence[Sequence[str]]) -> list[list]:
        """The results of a function for each source with each of its texts, a batch at a time."""
        pairs = [(source, text) for source, own in zip(sources, texts, strict=True) for text in own]
        results: list = []
        for start in range(0, len(pairs), self.batch_size):
            results += function(*zip(*pairs[start : start + self.batch_size], strict=True))
        remaining = iter(results)
        return [list(islice(remaining, len(own))) for own in texts]


def _answer_from_memories(model, processor, memories: Sequence[torch.Tensor], questions, max_new_tokens: int):
    return answer_from_memory(model, processor, torch.stack(list(memories)), questions, max_new_tokens)


def _rows_of(embeds: torch.Tensor) -> list[torch.Tensor]:
    return [embed.clone() for embed in embeds]


def _batches(rows: Iterable, batch_size: int) -> Iterator[list]:
    remaining = iter(progress(rows, desc="images", unit="image"))
    while batch := list(islice(remaining, batch_size)):
        yield batch
