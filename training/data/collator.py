"""The collator: rows of a data set as one batch of images, and of texts that point to an image or a box."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.tokenization_utils_base import LARGE_INTEGER

from mmgem.processing.boxes import boxes_in_view, check_boxes, is_in_view, model_views
from mmgem.processing.image_loading import load_image
from mmgem.text_rows import IGNORED_LABEL, TEXT_COLUMNS, Role
from mmgem.training.data.augmentation import Augmentation, View, may_be_augmented
from mmgem.training.data.drawn_texts import NONE, DrawnText, TextDrawing
from mmgem.training.data.feature_cache import CachedViews
from mmgem.training.data.image_files import shorter_side_for
from mmgem.training.data.permutation import hash_numbers
from mmgem.training.data.rows import (
    ID_COLUMNS,
    captions_of,
    check_row,
    edit_of,
    edited_file_of,
    images_of,
    row_name,
)
from mmgem.training.data.shared_memory import in_shared_memory
from mmgem.training.data.text_cache import CachedTexts


@dataclass(eq=False, repr=False)
class MMGEMCollator(TextDrawing):
    """Batch rows for the joint loss (meaning 4 of `MMGEMModel.forward`). A row may have these columns:

    | column | use |
    |---|---|
    | `image`, or `images` for several of one sample | any kind `load_image` takes; without, texts are only generated |
    | `captions` (a list), or `caption` or `text` | embedded and generated; without, the image is only a distractor |
    | `queries` (a list) | embedded: to find the image, but not to be written, such as captions in other languages |
    | `long_caption` | embedded |
    | `boxes`, `region_captions` | embedded and generated from the box; one caption for each box |
    | `label` | embedded, in words of `label_template` |
    | `qa`, of `{"question": ..., "answer": ...}` | the answer is generated |
    | `hard_negatives` | embedded, as texts that describe nothing |
    | `edit`, `{"instruction": ...}`, and `edited_image` | embedded after the image(s), to find the edited one |
    | `instructions`, of `{"text": ..., "box": ...}` | embedded with the image, to find that box of its `boxes` |
    | `prompt_name` | the model's prompt of that name stands before the texts that are embedded, such as `query` |
    | `image_id`, or `scene_id` or `file_name` | rows of equal id show one image: never each other's negatives |
    | `draw_seed` | an integer that alone decides what is drawn from the row, whoever collates it |
    | `row_key` | what errors and logs call the row |

    Without `draw_seed`, texts are drawn with torch's generator, so that runs repeat. Boxes that the image processor
    crops away are not drawn. Several images of one sample share its id, and each text goes to one of
    them. An edited image follows the image of its row, with an id of its own: where a file name is the id, that of
    `edit`, which may be another row's image.

    Args:
        processor: An `MMGEMProcessor`.
        augmentation: Arguments of [`mmgem.training.data.augmentation.Augmentation`], of which images get a view drawn
            by the `draw_seed` of their row; by default they are whole. Rows with several images or an edit are left
            as they are.
        cached_views: The features of a frozen tower, which then stand in the batch in place of pixels.
        cached_texts: The states of a frozen language model after the texts that are compared, in place of running it.
        options: How many texts of each kind are drawn, see [`TextDrawing`].

    Attributes:
        gives_references: Whether a batch has all captions of its images beside those that were drawn.

    Raises:
        ValueError: For options that [`TextDrawing`] refuses; for rows that `check_row` refuses, images that cannot be
            read, several images of a sample without an id, or a `prompt_name` that the model does not have.
    """

    processor: Any
    augmentation: dict[str, float] | None = None
    cached_views: CachedViews | None = None
    cached_texts: CachedTexts | None = None
    gives_references: bool = field(default=False, init=False)

    def __post_init__(self):
        super().__post_init__()
        self.augmentation_of_images = None if self.augmentation is None else Augmentation(**self.augmentation)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            rows: At least one row.

        Returns:
            For I images and T texts, of which there may be none: `pixel_values` (I, 3, H, W) if there are images, or
            `patch_features` (I, C, rows, columns) with `cached_views`,
            `boxes` (I, R, 4) if there are any, `image_ids` (I,) if the rows name their images, the columns of
            [`mmgem.text_rows.TextRows`] that the options need, `row_keys` (a list) if the rows have them,
            `references` (for each image its captions) if `gives_references` is set, and `return_loss` True.
        """
        inputs, _ = self.collate(rows)
        return in_shared_memory(inputs)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[int]]:
        """Make a batch, and say for each of its texts the number of the row that it is from."""
        names = [row_name(row, number) for number, row in enumerate(rows)]
        images: list[list[Image.Image]] = []  # of each row
        shown: list[list[View]] = []
        keys: list[str] = []  # of all images, where they have cached features
        rows = list(rows)
        for number, (row, name) in enumerate(zip(rows, names, strict=True)):
            check_row(row, name)
            options: dict[str, Any] = {"name": f"image of {name}", "allow_urls": self.processor.allow_urls}
            options["shorter_side"] = None if row.get("boxes") else self.shorter_side
            images.append([load_image(image, **options) for image in self.pictures_of(row)])
            own_views, own_keys = self._views_of(row, images[-1])
            shown.append(own_views)
            keys += own_keys
            if own_views and self.augmentation_of_images is not None:
                rows[number] = own_views[0].carry(row, self.augmentation_of_images.min_box)
        inputs: dict[str, Any] = {"return_loss": True}
        view_size = 0, 0
        if keys:
            assert self.cached_views is not None
            inputs["patch_features"], view_size = self.cached_views.look_up(keys)
        elif pairs := [pair for own in zip(images, shown, strict=True) for pair in zip(*own, strict=True)]:
            inputs |= self.processor(images=[view.apply(image) for image, view in pairs], return_tensors="pt")
            view_size = tuple(inputs["pixel_values"].shape[-2:])
        uses_boxes = self.uses_boxes and any(row.get("boxes") for row in rows)
        sizes = [[view.size for view in own] for own in shown]
        boxes, views = self._boxes_of(rows, sizes, view_size) if uses_boxes else ([], [])

        texts: list[DrawnText] = []
        row_index: list[int] = []  # of each text
        first = 0  # image of the row
        for number, (row, row_images) in enumerate(zip(rows, images, strict=True)):
            in_view = [uses_boxes and is_in_view(box, views[first]) for box in row.get("boxes") or []]
            row_texts, drawn = self.draw_texts(row, in_view, first, len(texts))
            texts += row_texts
            row_index += [number] * len(row_texts)
            if uses_boxes and in_view:
                boxes[first] = boxes[first][drawn]
            first += len(row_images)
        if any(len(drawn_boxes) for drawn_boxes in boxes):
            inputs["boxes"] = torch.from_numpy(boxes_in_view(boxes, views))
        if not self.processor.is_plain:
            texts, row_index = _apart(texts, row_index)
        if (image_ids := self._image_ids(rows, names)) is not None:
            inputs["image_ids"] = image_ids
        if self.gives_references:
            inputs["references"] = [
                captions_of(row) if number == 0 else []
                for row, own in zip(rows, images, strict=True)
                for number in range(len(own))
            ]
        if all(row.get("row_key") is not None for row in rows):
            inputs["row_keys"] = [row["row_key"] for row in rows]
        columns = {name: _column(name, texts) for name in self.text_columns}
        inputs |= self.tokenize(texts) | columns
        if self.cached_texts is not None:
            inputs["text_states"] = self.cached_texts.look_up(inputs)
        return inputs, row_index

    @cached_property
    def shorter_side(self) -> int:
        """How far images of rows without boxes are scaled down, see [`shorter_side_for`]."""
        views = self.augmentation_of_images
        return shorter_side_for(self.processor, 1.0 if views is None else views.least_side)

    def _views_of(self, row: Mapping[str, Any], images: list[Image.Image]) -> tuple[list[View], list[str]]:
        """For each image of a row what is shown of it, and the key of its cached features, if there are any."""
        if self.cached_views is not None:
            pairs = [self.cached_views.view(row, image, self.view_number(row)) for image in images]
            return [view for view, _ in pairs], [key for _, key in pairs]
        if self.augmentation_of_images is None or not may_be_augmented(row):
            return [View.whole(image.size) for image in images], []
        number = self.view_number(row)
        return [self.augmentation_of_images.draw(row, image.size, number) for image in images], []

    @staticmethod
    def view_number(row: Mapping[str, Any]) -> int:
        """Return the number that decides which view of its image a row is trained with."""
        seed = row.get("draw_seed")
        return int(torch.randint(2**62, ())) if seed is None else hash_numbers(seed, 0)  # not as texts are drawn

    def _boxes_of(
        self, rows: Sequence[Mapping], sizes_of_rows: list[list[tuple[int, int]]], view_size: tuple[int, int]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """For each image its boxes, `(R_i, 4)` in its pixels, and what of it the model sees, `(x0, y0, x1, y1)`.

        Args:
            rows: As they are shown.
            sizes_of_rows: (width, height) of each image of each row, as it is shown.
            view_size: (height, width) of the pixels that the model gets.
        """
        boxes = [
            (row.get("boxes") or []) if number == 0 else []  # after the image they lie in, there may be an edited one
            for row, own in zip(rows, sizes_of_rows, strict=True)
            for number in range(len(own))
        ]
        sizes = [size for own in sizes_of_rows for size in own]
        height, width = view_size
        views = model_views(self.processor.image_processor, sizes, [(width, height)] * len(sizes))
        return check_boxes(boxes, sizes), views

    def _image_ids(self, rows: Sequence[Mapping], names: Sequence[str]) -> torch.Tensor | None:
        """(I,) a number for each image, from the column that all rows with images have; None where there is none."""
        shown = [(row, name) for row, name in zip(rows, names, strict=True) if images_of(row)]
        column = next((column for column in ID_COLUMNS if all(row.get(column) is not None for row, _ in shown)), None)
        if column is not None and shown:
            ids = []
            for row, _ in shown:
                num_own, num_all = len(images_of(row)), len(self.pictures_of(row))
                edited = edited_file_of(row) if column == "file_name" else row.get("edited_image_id")
                edited = f"{row[column]}-edited" if edited is None else str(edited)
                ids += [str(row[column])] * num_own + [edited] * (num_all - num_own)
            return torch.tensor([_number(name) for name in ids])
        if several := [name for row, name in shown if len(images_of(row)) > 1]:
            raise ValueError(
                f"{several[0]} has several `images` and no id; expected one of {ID_COLUMNS} in every row."
            )
        return None

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row that would end a run when it is drawn from.

        Args:
            row: A row that `check_row` has passed.

        Raises:
            ValueError: If it names a prompt that the model does not have, has an image that is too narrow, or has more
                images before its instruction than leave room for it.
        """
        self.check_prompt(row)
        for image in self.pictures_of(row):
            if isinstance(image, Image.Image):
                self.processor.check_proportions(image.size, f"image of {row_name(row, 0)}")
        room = self.processor.text_limit + self.processor.num_visual_tokens
        most = int((room - 1) // self.processor.num_visual_tokens)
        if self.edits_per_image and edit_of(row) is not None and len(images_of(row)) > most:
            raise ValueError(
                f"{row_name(row, 0)} has {len(images_of(row))} images before the instruction of its `edit`; expected "
                f"at most {most}, beside which a text fits."
            )

    def tokenize(self, texts: list[DrawnText]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels` (T, L) of T texts."""
        tokenizer = self.processor.tokenizer
        if not texts:
            return {name: torch.zeros(0, 0, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
        plain = self.processor.plain_text  # what stands for an image in the text of a row stands for nothing here
        texts = [replace(text, text=plain(text.text), prompt=plain(text.prompt)) for text in texts]
        rows, labels = [], []
        for prompt, answer in self._prompts_and_answers(texts):
            ids = torch.tensor(prompt + answer, dtype=torch.long)
            rows.append(ids)
            labels.append(ids.masked_fill(torch.arange(len(ids)) < len(prompt), IGNORED_LABEL))
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        }

    def _prompts_and_answers(self, texts: list[DrawnText]) -> list[tuple[list[int], list[int]]]:
        """For each text the tokens that nobody learns to write, and those that the model does."""
        tokenizer, limit = self.processor.tokenizer, self.processor.text_limit
        encoded = tokenizer([text.prompt or text.text for text in texts], truncation=limit < LARGE_INTEGER)
        self.processor.note_cut_texts(encoded)
        plain = encoded["input_ids"]
        parts, prompts = [], {}
        for text, ids in zip(texts, plain, strict=True):
            images, is_view = _images_before(text)
            if images and not self.processor.is_plain:
                asked = self._cut_text(text.prompt if text.is_generated else text.text, limit // 2)
                key = asked, images, is_view
                if key not in prompts:
                    prompts[key] = self.processor.prompt_ids(*key)
                answer = self.processor.answer_ids(text.text, asked, images) if text.is_generated else []
                parts.append((prompts[key], self._cut(answer, max(0, limit - len(prompts[key])))))
            elif text.prompt:
                answer = tokenizer(text.text, add_special_tokens=False)["input_ids"]
                asked_ids = self._cut(ids, limit - min(len(answer), limit // 2))
                parts.append((asked_ids, self._cut(answer, limit - len(asked_ids))))
            else:
                further = self.processor.num_visual_tokens * (len(text.columns.get("fused_index", [0])) - 1)
                ids = self._cut(ids, limit - further)
                parts.append(([], ids) if text.is_generated else (ids, []))
        return parts

    def _cut(self, ids: list[int], room: int) -> list[int]:
        if len(ids) > room:
            self.processor.note_cut_text(len(ids), room)
        return ids[:room]

    def _cut_text(self, text: str, room: int) -> str:
        """A text that a chat template is to be put around, cut where its tokens end."""
        encoded = self.processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if len(self._cut(encoded["input_ids"], room)) == len(encoded["input_ids"]):
            return text
        return text[: encoded["offset_mapping"][room - 1][1]]


def _images_before(text: DrawnText) -> tuple[int, bool]:
    """How many images, boxes or memories a text stands after where it is written or read, and whether they are images
    that are seen whole."""
    columns = text.columns
    if not text.is_generated:
        return len(columns.get("fused_index", [])), True
    is_memory = columns.get("memory_row", NONE) >= 0
    return int(is_memory or columns.get("image_index", NONE) >= 0), not is_memory and columns.get(
        "box_index", NONE
    ) < 0


def _apart(texts: list[DrawnText], row_index: list[int]) -> tuple[list[DrawnText], list[int]]:
    """Each text that is embedded and written as two: it is embedded alone, but written as the answer to a prompt.

    Those to be written come last, so that what points to a text still does.
    """
    both = [i for i, text in enumerate(texts) if text.is_generated and text.columns.get("contrastive_mask")]
    embedded = [replace(text, is_generated=text.is_generated and i not in both) for i, text in enumerate(texts)]
    written = [replace(texts[i], columns={**texts[i].columns, "contrastive_mask": False}) for i in both]
    return embedded + written, row_index + [row_index[i] for i in both]


def _column(name: str, texts: list[DrawnText]) -> torch.Tensor:
    """(T,) the values of one column of texts, or (T, F) of one that can point to several."""
    column = TEXT_COLUMNS[name]
    default = False if column.role is Role.FLAG else NONE
    dtype = torch.bool if column.role is Role.FLAG else torch.long
    values = [text.columns.get(name, [] if column.several else default) for text in texts]
    if column.several:
        width = max([1, *map(len, values)])
        values = [[*own, *[NONE] * (width - len(own))] for own in values]
        return torch.tensor(values, dtype=dtype).reshape(len(texts), width)
    return torch.tensor(values, dtype=dtype)


def _number(name: str) -> int:
    """The same 40-bit number for the same name, on every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=5).digest(), "big")
