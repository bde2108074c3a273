"""Rows of a data set become one batch of images and of texts that know which image, or box, they describe."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from mmgem.model_inputs import IGNORED_LABEL
from mmgem.processing.boxes import boxes_in_view, check_boxes, model_views
from mmgem.processing.image_loading import load_image
from mmgem.training.data.rows import ID_COLUMNS, captions_of, check_row, images_of, row_name

WHOLE_IMAGE = -1
NO_IMAGE = -1


@dataclass
class TextRow:
    """
    One text of a batch.

    Args:
        image_index: the image it describes, or -1 for none.
        text: what is embedded and generated.
        prompt: what stands before it and is neither embedded nor generated; only without `is_embedded`.
        box_index: the box of that image it describes, or -1 for the whole image.
        is_generated: whether the model learns to write it.
        is_embedded: whether the model learns to find its image by it, and it by its image.
        is_hard_negative: whether it is wrong on purpose, so that the image has to be told from it.
    """

    image_index: int
    text: str
    prompt: str = ""
    box_index: int = WHOLE_IMAGE
    is_generated: bool = True
    is_embedded: bool = True
    is_hard_negative: bool = False


class MMGEMCollator:
    """
    Batches rows for the joint loss (meaning 4 of `MMGEMModel.forward`). What a row may have:

    | column | what is trained |
    |---|---|
    | `image`, or `images` for several of one sample | any kind `load_image` takes; without, texts are only generated |
    | `captions` (a list), or `caption` or `text` | embedded and generated; without, the image is only a distractor |
    | `long_caption` | embedded |
    | `boxes`, `region_captions` | embedded and generated from the box; one caption for each box |
    | `label` | embedded, in words of `label_template` |
    | `qa`, of `{"question": ..., "answer": ...}` | the answer is generated |
    | `hard_negatives` | embedded, as texts that describe nothing |
    | `image_id`, or `scene_id` or `file_name` | rows of equal id show one image: never each other's negatives |
    | `draw_seed` | an integer that alone decides what is drawn from the row, whoever collates it |
    | `row_key` | what errors and logs call the row |

    Without `draw_seed`, what is drawn at random is drawn with torch's generator, so that runs repeat. Boxes that the
    image processor crops away are not drawn. Several images of one sample share its id, and each text goes to one of
    them.

    Args:
        processor: an `MMGEMProcessor`.
        captions_per_image: captions drawn for each image; each is embedded and generated.
        regions_per_image: boxes drawn for each image; their captions are embedded and generated.
        questions_per_image: questions drawn for each image; the answers are generated.
        long_caption_probability: share of the images whose long caption is embedded.
        label_template: text to embed for a `label`, such as "a photo of a {label}"; None to leave labels out.
        hard_negatives_per_image: hard negatives drawn for each image.
        prompts: instructions by name, those of the model's configuration.

    Raises:
        ValueError: for rows that `check_row` refuses, images that cannot be read, several images of a sample without
            an id, or a batch without any text.
    """

    def __init__(
        self,
        processor,
        captions_per_image: int = 1,
        regions_per_image: int = 2,
        questions_per_image: int = 1,
        long_caption_probability: float = 0.25,
        label_template: str | None = None,
        hard_negatives_per_image: int = 0,
        prompts: Mapping[str, str] | None = None,
    ):
        self.processor = processor
        self.captions_per_image = captions_per_image
        self.regions_per_image = regions_per_image
        self.questions_per_image = questions_per_image
        self.long_caption_probability = long_caption_probability
        self.label_template = label_template
        self.hard_negatives_per_image = hard_negatives_per_image
        self.prompts = dict(prompts or {})

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows: at least one row.

        Returns:
            For I images and T texts: `pixel_values` (I, 3, H, W) if there are images, `boxes` (I, R, 4) if there are
            any, `image_ids` (I,) if the rows name their images, `input_ids`, `attention_mask` and `labels` (T, L),
            `image_index` (-1 for a text without image), `box_index` (-1 for the whole image), `row_index` (the row it
            is from) and `contrastive_mask` (T,), `hard_negative_mask` (T,) if there are any, `row_keys` (a list) if
            the rows have them, `return_loss` True.
        """
        names = [row_name(row, number) for number, row in enumerate(rows)]
        images: list[list[Image.Image]] = []  # of each row
        for row, name in zip(rows, names, strict=True):
            check_row(row, name)
            images.append([load_image(image, f"image of {name}") for image in images_of(row)])
        pictures = [image for row_images in images for image in row_images]
        inputs: dict[str, Any] = {"return_loss": True}
        if pictures:
            inputs |= self.processor(images=pictures, return_tensors="pt")
        uses_boxes = self.regions_per_image > 0 and any(row.get("boxes") for row in rows)
        boxes, views = self._boxes_of(rows, images, inputs["pixel_values"]) if uses_boxes else ([], [])

        texts: list[TextRow] = []
        row_index: list[int] = []  # of each text
        first = 0  # image of the row
        for number, (row, row_images) in enumerate(zip(rows, images, strict=True)):
            in_view = [uses_boxes and _is_in_view(box, views[first]) for box in row.get("boxes") or []]
            row_texts, drawn = self._texts_of(row, range(first, first + len(row_images)), in_view)
            texts += row_texts
            row_index += [number] * len(row_texts)
            if uses_boxes and in_view:
                boxes[first] = boxes[first][drawn]
            first += len(row_images)
        if not texts:
            raise ValueError(f"{', '.join(names)} have no text; expected a caption in at least one row of a batch.")

        if any(len(drawn_boxes) for drawn_boxes in boxes):
            inputs["boxes"] = torch.from_numpy(boxes_in_view(boxes, views))
        if (image_ids := _image_ids(rows, names)) is not None:
            inputs["image_ids"] = image_ids
        if any(text.is_hard_negative for text in texts):
            inputs["hard_negative_mask"] = torch.tensor([text.is_hard_negative for text in texts])
        if all(row.get("row_key") is not None for row in rows):
            inputs["row_keys"] = [row["row_key"] for row in rows]
        return inputs | {
            **self._tokenize(texts),
            "image_index": torch.tensor([text.image_index for text in texts]),
            "box_index": torch.tensor([text.box_index for text in texts]),
            "row_index": torch.tensor(row_index),
            "contrastive_mask": torch.tensor([text.is_embedded for text in texts]),
        }

    def count_tokens(self, row: Mapping[str, Any]) -> int:
        """
        Tokens that the language model gets for a row: of each text drawn from it, once to write and once to embed it,
        and the visual tokens before what is written.

        Args:
            row: with a `draw_seed`; its images need not be loaded, so a box counts even if it will be cropped away.

        Raises:
            ValueError: if the row has no `draw_seed`, so that it is not known what will be drawn.
        """
        if row.get("draw_seed") is None:
            raise ValueError(
                f"the row has columns {sorted(row)}; expected a `draw_seed`, as the rows of a Mixture have."
            )
        in_view = [True] * len(row.get("boxes") or [])
        texts, _ = self._texts_of(row, range(len(images_of(row))), in_view)
        lengths = self._tokenize(texts)["attention_mask"].sum(-1).tolist() if texts else []
        count = 0
        for text, length in zip(texts, lengths, strict=True):
            visual = self.processor.num_visual_tokens if text.image_index != NO_IMAGE else 0
            count += (length + visual) * text.is_generated + length * text.is_embedded
        return count

    def _texts_of(
        self, row: Mapping[str, Any], indices: range, in_view: Sequence[bool]
    ) -> tuple[list[TextRow], list[int]]:
        """
        What is drawn from a row.

        Args:
            row: its columns.
            indices: its images in the batch.
            in_view: for each of its boxes, whether the model sees it.

        Returns:
            The texts, and the numbers of the boxes that some of them describe.
        """
        has_image, seed = len(indices) > 0, row.get("draw_seed")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        texts = [
            TextRow(_draw_image(indices, generator), caption, is_embedded=has_image)
            for caption in _draw(captions_of(row), self.captions_per_image, generator)
        ]
        if has_image and row.get("long_caption"):
            if float(torch.rand((), generator=generator)) < self.long_caption_probability:
                texts.append(TextRow(_draw_image(indices, generator), row["long_caption"], is_generated=False))
        if has_image and self.label_template is not None and row.get("label") is not None:
            label = self.label_template.format(label=row["label"])
            texts.append(TextRow(_draw_image(indices, generator), label, is_generated=False))
        for turn in _draw(row.get("qa") or [], self.questions_per_image, generator):
            image_index = _draw_image(indices, generator)
            texts.append(TextRow(image_index, " " + turn["answer"], prompt=turn["question"], is_embedded=False))

        order = _draw(range(len(in_view)), len(in_view), generator)
        boxes = [box for box in order if in_view[box]][: self.regions_per_image]
        for place, box in enumerate(boxes):
            texts.append(TextRow(indices[0], row["region_captions"][box], box_index=place))
        if has_image and self.hard_negatives_per_image:
            for text in _draw(row.get("hard_negatives") or [], self.hard_negatives_per_image, generator):
                image_index = _draw_image(indices, generator)
                texts.append(TextRow(image_index, text, is_generated=False, is_hard_negative=True))
        return texts, boxes

    def _boxes_of(
        self, rows: Sequence[Mapping], images: list[list[Image.Image]], pixel_values: torch.Tensor
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each image its boxes, `(R_i, 4)` in its pixels, and what of it the model sees, `(x0, y0, x1, y1)`."""
        boxes = [row.get("boxes") or [] for row, own in zip(rows, images, strict=True) for _ in own]
        sizes = [image.size for own in images for image in own]
        height, width = pixel_values.shape[-2:]
        views = model_views(self.processor.image_processor, sizes, [(width, height)] * len(sizes))
        return check_boxes(boxes, sizes), views

    def _tokenize(self, texts: list[TextRow]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        truncation = self.processor.text_kwargs["truncation"]
        plain = tokenizer([text.prompt or text.text for text in texts], truncation=truncation)["input_ids"]
        rows, labels = [], []
        for text, ids in zip(texts, plain, strict=True):
            prompt_length = 0
            if text.prompt:
                prompt_length = len(ids)
                ids = ids + tokenizer(text.text, add_special_tokens=False)["input_ids"]
            ids = torch.tensor(ids, dtype=torch.long)
            rows.append(ids)
            generated = ids.clone()
            generated[: prompt_length if text.is_generated else len(ids)] = IGNORED_LABEL
            labels.append(generated)
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        }


def _is_in_view(box: Sequence[float], view: np.ndarray) -> bool:
    """Whether the model sees more of a box than rounding leaves."""
    x0, y0, x1, y1 = (float(edge) for edge in box)
    margin = 1e-6 * (view[2:] - view[:2]).max()
    overlap = min(x1, view[2]) - max(x0, view[0]), min(y1, view[3]) - max(y0, view[1])
    return min(overlap) > margin


def _image_ids(rows: Sequence[Mapping], names: Sequence[str]) -> torch.Tensor | None:
    """(I,) a number for each image of the rows, from the column that all of them have; None where there is none."""
    counts = [len(images_of(row)) for row in rows]
    shown = [(row, name, count) for row, name, count in zip(rows, names, counts, strict=True) if count]
    column = next((column for column in ID_COLUMNS if all(row.get(column) is not None for row, _, _ in shown)), None)
    if column is not None and shown:
        return torch.tensor([_number(row[column]) for row, _, count in shown for _ in range(count)])
    if several := [name for _, name, count in shown if count > 1]:
        raise ValueError(f"{several[0]} has several `images` and no id; expected one of {ID_COLUMNS} in every row.")
    return None


def _number(name: str | int) -> int:
    """The same 40-bit number for the same name, on every process."""
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=5).digest(), "big")


def _draw(items: Sequence, count: int, generator: torch.Generator | None) -> list:
    """`count` of the items, or all if there are fewer, in random order."""
    return [items[i] for i in torch.randperm(len(items), generator=generator)[:count].tolist()]


def _draw_image(indices: range, generator: torch.Generator | None) -> int:
    """One of the images of a sample, or `NO_IMAGE`."""
    if len(indices) < 2:
        return indices[0] if indices else NO_IMAGE
    return indices[int(torch.randint(len(indices), (), generator=generator))]
