"""What a model makes of rows: the embeddings of their images, and what it writes about them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm

from mmgem.processing.boxes import is_in_view, model_views
from mmgem.processing.image_loading import load_image
from mmgem.training.data.rows import IMAGE_COLUMNS, captions_of, edit_of, images_of
from mmgem.training.inference import (
    ANSWER_TOKENS,
    answer_from_memory,
    embed_and_remember,
    embed_fused,
    embed_images,
    embed_regions,
    embedded_kinds,
    generate_answers,
    generate_region_captions,
    remember,
)
from mmgem.training.scenes.caption_parser import parse_caption

_PICTURES = (*IMAGE_COLUMNS, "edited_image")


@dataclass
class Reading:
    """
    What a model makes of a row, beside the row's columns without its pictures, which would fill the memory.

    An embedding is (D,) or (k, D); what the row has no columns for is None or empty.

    Args:
        row: the other columns.
        image_embed: of the image.
        caption: of the image.
        fused_embed: of the image through the language model.
        memory_caption: from the memory of the image alone; only beside captions of scenes, which can be judged.
        answers, memory_answers: to the questions of `qa`, from the image and from its memory alone.
        region_embeds: (R, D) or (R, k, D), of the boxes.
        region_captions: of the boxes.
        instruction_embeds: (N, D) or (N, k, D), of the image with each of its `instructions`.
        edit_embed: of the image with the instruction of its `edit`.
        twin_embed: of the edited image.
    """

    row: dict[str, Any]
    image_embed: torch.Tensor
    caption: str | None = None
    fused_embed: torch.Tensor | None = None
    memory_caption: str | None = None
    answers: list[str] = field(default_factory=list)
    memory_answers: list[str] = field(default_factory=list)
    region_embeds: torch.Tensor | None = None
    region_captions: list[str] = field(default_factory=list)
    instruction_embeds: torch.Tensor | None = None
    edit_embed: torch.Tensor | None = None
    twin_embed: torch.Tensor | None = None


def questions_of(row: Mapping[str, Any]) -> list[str]:
    """The questions of a row, or []."""
    return [turn["question"] for turn in row.get("qa") or []]


def region_texts_of(row: Mapping[str, Any]) -> list[str]:
    """The captions of a row's boxes, or [].

    Raises:
        ValueError: If there are captions, but not as many as boxes.
    """
    texts, boxes = row.get("region_captions") or [], row.get("boxes") or []
    if texts and len(texts) != len(boxes):
        raise ValueError(f"a row of dataset has {len(boxes)} boxes and {len(texts)} region_captions, expected as many")
    return texts


def instructions_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The `instructions` of a row, each naming one of its boxes, or []; also where there is only one box to name.

    Raises:
        ValueError: If an instruction names a box that the row does not have.
    """
    instructions, count = row.get("instructions") or [], len(row.get("boxes") or [])
    for instruction in instructions:
        if not 0 <= instruction["box"] < count:
            raise ValueError(f"a row of dataset has {count} boxes and an instruction for number {instruction['box']}")
    return instructions if count > 1 else []


def _checked(row: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """Raises a ValueError for a row that cannot be measured."""
    if len(images_of(row)) != 1:
        raise ValueError(f"row {number} of dataset has {len(images_of(row))} images, expected one")
    for turn in row.get("qa") or []:
        if not isinstance(turn, Mapping) or not {"question", "answer"} <= set(turn):
            raise ValueError(f"row {number} of dataset has {turn!r:.80} in `qa`, expected a question and an answer")
    region_texts_of(row)
    instructions_of(row)
    return row


class RowReader:
    """
    Reads rows: embeds and writes all that their columns allow, in batches.

    Args:
        model: an `MMGEMModel`, on any device; its training mode is the same afterwards.
        processor: its `MMGEMProcessor`.
        batch_size: images, questions or instructions at a time.
        max_new_tokens: at which a caption is cut; answers are cut at `ANSWER_TOKENS` at the latest.
    """

    def __init__(self, model, processor, batch_size: int, max_new_tokens: int):
        self.model, self.processor = model, processor
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.max_answer_tokens = min(max_new_tokens, ANSWER_TOKENS)
        self.prompts = model.config.prompts or {}
        # Where a prompt is read in the place of [EMB] vectors, there is no memory, and all images go through the
        # language model anyway.
        self.has_memory = model.config.embedding_prompt_ids is None
        self.can_fuse = "fused" in embedded_kinds(model.config)

    def read(self, rows: Iterable[Mapping[str, Any]]) -> list[Reading]:
        """
        Args:
            rows: dicts as for `evaluate_model`.

        Returns:
            A reading of each row. No embedding is a view of its batch: it would be sent to other processes with all
            of it.
        """
        readings: list[Reading] = []
        for unchecked in _batches(rows, self.batch_size):
            batch = [self._visible(_checked(row, len(readings) + number)) for number, row in enumerate(unchecked)]
            images = [images_of(row)[0] for row in batch]
            columns = [{name: value for name, value in row.items() if name not in _PICTURES} for row in batch]
            embeds = _rows_of(embed_images(self.model, self.processor, images))
            new = [Reading(*pair) for pair in zip(columns, embeds, strict=True)]
            self._look(new, images)
            self._remember(new, images)
            self._read_regions(new, images)
            self._read_edits(new, images, [edit_of(row) for row in batch])
            readings += new
        return readings

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

    def _look(self, readings: Sequence[Reading], images: Sequence[Any]):
        """Captions and answers, from the images."""
        is_told = [bool(captions_of(reading.row)) for reading in readings]
        texts = self._write(generate_answers, images, readings, is_told)
        for reading, (caption, answers) in zip(readings, texts, strict=True):
            reading.caption, reading.answers = caption, answers

    def _remember(self, readings: Sequence[Reading], images: Sequence[Any]):
        """Embeddings through the language model; captions and answers from the memory that these passes leave."""
        told = [number for number, one in enumerate(readings) if captions_of(one.row) or questions_of(one.row)]
        if not self.has_memory or not told:
            return
        readings = [readings[number] for number in told]
        own_images = [images[number] for number in told]
        if self.can_fuse:
            embeds, memories = embed_and_remember(self.model, self.processor, own_images)
            for reading, embed in zip(readings, _rows_of(embeds), strict=True):
                reading.fused_embed = embed if captions_of(reading.row) else None
        else:
            memories = remember(self.model, self.processor, own_images)
        is_judged = [_is_scene(captions_of(reading.row)) for reading in readings]
        texts = self._write(_answer_from_memories, list(memories), readings, is_judged)
        for reading, (caption, answers) in zip(readings, texts, strict=True):
            reading.memory_caption, reading.memory_answers = caption, answers

    def _write(self, answer: Callable, sources: Sequence, readings: Sequence[Reading], is_told: Sequence[bool]):
        """For each reading what `answer` makes of its source: a caption, where it is told, and its answers."""
        answer = partial(answer, self.model, self.processor)
        nothing = [[""] if told else [] for told in is_told]  # a caption answers the empty question
        captions = self._each(partial(answer, max_new_tokens=self.max_new_tokens), sources, nothing)
        questions = [questions_of(reading.row) for reading in readings]
        answers = self._each(partial(answer, max_new_tokens=self.max_answer_tokens), sources, questions)
        return zip([next(iter(caption), None) for caption in captions], answers, strict=True)

    def _read_regions(self, readings: Sequence[Reading], images: Sequence[Any]):
        """Embeddings and captions of boxes, and what instructions make of the image."""
        boxed = [n for n, one in enumerate(readings) if region_texts_of(one.row) or instructions_of(one.row)]
        if boxed:
            boxes = [readings[number].row["boxes"] for number in boxed]
            embeds = embed_regions(self.model, self.processor, [images[number] for number in boxed], boxes)
            for number, own_embeds in zip(boxed, embeds.split([len(own) for own in boxes]), strict=True):
                readings[number].region_embeds = own_embeds.clone()
        captioned = [number for number in boxed if region_texts_of(readings[number].row)]
        if captioned:
            boxes = [readings[number].row["boxes"] for number in captioned]
            own_images = [images[number] for number in captioned]
            captions = iter(
                generate_region_captions(self.model, self.processor, own_images, boxes, self.max_new_tokens)
            )
            for number, own_boxes in zip(captioned, boxes, strict=True):
                readings[number].region_captions = list(islice(captions, len(own_boxes)))

        if not self.can_fuse:
            return
        prompt = self.prompts.get("object", "")
        texts = [[prompt + one["text"] for one in instructions_of(reading.row)] for reading in readings]
        for reading, own_embeds in zip(readings, self._each(self._embed, images, texts), strict=True):
            reading.instruction_embeds = torch.stack(own_embeds) if own_embeds else None

    def _read_edits(self, readings: Sequence[Reading], images: Sequence[Any], edits: Sequence[tuple[str, Any] | None]):
        """What the instruction of an edit makes of the image, and the embedding of what should come of it."""
        edited = [
            (reading, image, *edit) for reading, image, edit in zip(readings, images, edits, strict=True) if edit
        ]
        if not edited or not self.can_fuse:
            return
        edited_readings, own_images, instructions, twins = zip(*edited, strict=True)
        prompt = self.prompts.get("edit", "")
        edit_embeds = self._embed(own_images, [prompt + instruction for instruction in instructions])
        twin_embeds = _rows_of(embed_images(self.model, self.processor, twins))
        for reading, edit_embed, twin_embed in zip(edited_readings, edit_embeds, twin_embeds, strict=True):
            reading.edit_embed, reading.twin_embed = edit_embed, twin_embed

    def _embed(self, images: Sequence[Any], texts: Sequence[str]) -> list[torch.Tensor]:
        return _rows_of(embed_fused(self.model, self.processor, images, texts))

    def _each(self, function: Callable, sources: Sequence, texts: Sequence[Sequence[str]]) -> list[list]:
        """What a function makes of each source with each of its texts, a batch at a time."""
        pairs = [(source, text) for source, own in zip(sources, texts, strict=True) for text in own]
        results: list = []
        for start in range(0, len(pairs), self.batch_size):
            results += function(*zip(*pairs[start : start + self.batch_size], strict=True))
        remaining = iter(results)
        return [list(islice(remaining, len(own))) for own in texts]


def _is_scene(captions: Sequence[str]) -> bool:
    return bool(captions) and parse_caption(captions[0]) is not None


def _answer_from_memories(model, processor, memories: Sequence[torch.Tensor], questions, max_new_tokens: int):
    return answer_from_memory(model, processor, torch.stack(list(memories)), questions, max_new_tokens)


def _rows_of(embeds: torch.Tensor) -> list[torch.Tensor]:
    return [embed.clone() for embed in embeds]


def _batches(rows: Iterable[Mapping[str, Any]], batch_size: int) -> Iterator[list[Mapping[str, Any]]]:
    remaining = iter(tqdm(rows, desc="images", unit="image"))
    while batch := list(islice(remaining, batch_size)):
        yield batch
