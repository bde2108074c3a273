"""Rows of a data set become one batch of images and of texts that know which image, or box, they describe."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from mmgem.modeling_mmgem import IGNORED_LABEL

CAPTION_COLUMNS = ("captions", "caption", "text")
ID_COLUMNS = ("image_id", "scene_id", "file_name")
WHOLE_IMAGE = -1


@dataclass
class TextRow:
    """
    One text of a batch.

    Args:
        image_index: the image it describes.
        text: what is embedded and generated.
        prompt: what stands before it and is neither embedded nor generated; only without `is_embedded`.
        box_index: the box of that image it describes, or -1 for the whole image.
        is_generated: whether the model learns to write it.
        is_embedded: whether the model learns to find its image by it, and it by its image.
    """

    image_index: int
    text: str
    prompt: str = ""
    box_index: int = WHOLE_IMAGE
    is_generated: bool = True
    is_embedded: bool = True


class MMGEMCollator:
    """
    Batches rows for the joint loss (meaning 4 of `MMGEMModel.forward`). Rows have an `image`, and `captions` (a list)
    or `caption` or `text`; whatever else of the following columns they have is trained too: `long_caption`, `boxes`
    with `region_captions`, `label`, `qa`. Rows of equal `image_id` (or `scene_id` or `file_name`) show the same image
    and are never each other's negatives. What is drawn at random is drawn with torch's generator, so that runs repeat.

    Args:
        processor: an `MMGEMProcessor`.
        captions_per_image: captions drawn for each image; each is embedded and generated.
        regions_per_image: boxes drawn for each image; their captions are embedded and generated.
        questions_per_image: questions drawn for each image; the answers are generated.
        long_caption_probability: share of the images whose long caption is embedded.
        label_template: text to embed for a `label`, such as "a photo of a {label}"; None to leave labels out.

    Raises:
        ValueError: for a row without image or caption, or a box without caption.
    """

    def __init__(
        self,
        processor,
        captions_per_image: int = 1,
        regions_per_image: int = 2,
        questions_per_image: int = 1,
        long_caption_probability: float = 0.25,
        label_template: str | None = None,
    ):
        self.processor = processor
        self.captions_per_image = captions_per_image
        self.regions_per_image = regions_per_image
        self.questions_per_image = questions_per_image
        self.long_caption_probability = long_caption_probability
        self.label_template = label_template

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: at least one row.

        Returns:
            `pixel_values` (B, 3, H, W), `boxes` (B, R, 4) if there are any, `image_ids` (B,) if the rows name their
            images, `input_ids`, `attention_mask` and `labels` (T, L), `image_index`, `box_index` and
            `contrastive_mask` (T,), `return_loss` True.
        """
        texts, boxes = [], []
        for image_index, row in enumerate(rows):
            row_texts, row_boxes = self._texts_of(row, image_index)
            texts += row_texts
            boxes.append(row_boxes)
        inputs = self.processor(
            images=[row["image"] for row in rows], boxes=boxes if any(boxes) else None, return_tensors="pt"
        )
        id_column = next((column for column in ID_COLUMNS if all(row.get(column) is not None for row in rows)), None)
        if id_column is not None:
            inputs["image_ids"] = torch.tensor([_number(row[id_column]) for row in rows])
        return {
            **inputs,
            **self._tokenize(texts),
            "image_index": torch.tensor([text.image_index for text in texts]),
            "box_index": torch.tensor([text.box_index for text in texts]),
            "contrastive_mask": torch.tensor([text.is_embedded for text in texts]),
            "return_loss": True,
        }

    def _texts_of(self, row: Mapping, image_index: int) -> tuple[list[TextRow], list[Sequence[float]]]:
        captions = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), None)
        if row.get("image") is None or captions is None:
            raise ValueError(
                f"row {image_index} has columns {sorted(row)}; expected `image` and one of {CAPTION_COLUMNS}."
            )
        captions = [captions] if isinstance(captions, str) else captions
        texts = [TextRow(image_index, caption) for caption in _draw(captions, self.captions_per_image)]
        if row.get("long_caption") and float(torch.rand(())) < self.long_caption_probability:
            texts.append(TextRow(image_index, row["long_caption"], is_generated=False))
        if self.label_template is not None and row.get("label") is not None:
            texts.append(TextRow(image_index, self.label_template.format(label=row["label"]), is_generated=False))
        for turn in _draw(row.get("qa") or [], self.questions_per_image):
            texts.append(TextRow(image_index, " " + turn["answer"], prompt=turn["question"], is_embedded=False))

        boxes = row.get("boxes") or []
        region_captions = row.get("region_captions") or []
        if len(boxes) != len(region_captions):
            raise ValueError(
                f"row {image_index} has {len(boxes)} `boxes` and {len(region_captions)} `region_captions`; "
                "expected as many of each."
            )
        drawn = _draw(range(len(boxes)), self.regions_per_image)
        texts += [TextRow(image_index, region_captions[box], box_index=i) for i, box in enumerate(drawn)]
        return texts, [boxes[box] for box in drawn]

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


def _number(name: str | int) -> int:
    """The same 40-bit number for the same name, on every process."""
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=5).digest(), "big")


def _draw(items: Sequence, count: int) -> list:
    """`count` of the items, or all if there are fewer, in random order."""
    return [items[i] for i in torch.randperm(len(items))[:count].tolist()]
