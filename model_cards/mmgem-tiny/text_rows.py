"""The texts of a batch: the one schema of what is known of each of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from textwrap import fill
from typing import Any

import torch

from .input_checks import is_box

IGNORED_LABEL = -100


def first_token_id(token_id: int | list[int] | None) -> int:
    """Some language models list several end tokens; some have none, and -1 equals no token."""
    if isinstance(token_id, list | tuple):
        return token_id[0]
    return -1 if token_id is None else token_id


def is_first_token(input_ids: torch.Tensor, attention_mask: torch.Tensor, token_id: int | list[int] | None):
    """(B, L) -> (B, L), True for a token that its row, wherever it is padded, begins with, and that is `token_id`."""
    is_token = attention_mask.bool()
    return is_token & (is_token.cumsum(-1) == 1) & (input_ids == first_token_id(token_id))


class Role(Enum):
    """What the values of a column are."""

    TOKENS = "one value for each token"
    IMAGE = "numbers of images"
    BOX = "numbers of boxes of the image in `image_index`"
    TEXT = "numbers of texts"
    FLAG = "True or False"
    STATES = "states of the language model"


@dataclass(frozen=True)
class Column:
    """What the batch, its chunks and its preview need to know of a column.

    Args:
        role: What its values are.
        description: For the docstrings of [`TextRows`] and of `MMGEMModel.forward`.
        several: Whether a text may point to several, (T, F), as well as to one, (T,).
        pointed_to_as: What a text that others point to is for them.
    """

    role: Role
    description: str
    several: bool = False
    pointed_to_as: str = ""


def _column(role: Role, description: str, **options) -> Any:
    return field(metadata={"column": Column(role, description, **options)})


@dataclass
class TextRows:
    """The T texts of a joint step. A pointer is -1 where there is nothing to point to.

    Args:
        {columns}
        reads_memory: Whether any text of any process may be generated from a memory.
    """

    input_ids: torch.Tensor = _column(Role.TOKENS, "(T, L) texts, padded on either side.")
    attention_mask: torch.Tensor = _column(Role.TOKENS, "(T, L) 1 for tokens, 0 for padding.")
    labels: torch.Tensor = _column(
        Role.TOKENS,
        "(T, L) token ids to be generated, -100 elsewhere; by default every token. A row of -100 is only embedded. An "
        "end-of-sequence token is appended to each generated text.",
    )
    image_index: torch.Tensor = _column(
        Role.IMAGE,
        "(T,) which image each text describes; by default text i describes image i. -1 for a text without an image, "
        "of which language modelling is learned (then `pixel_values` may be missing as well).",
    )
    box_index: torch.Tensor = _column(Role.BOX, "(T,) which box of that image; -1 (the default) for the whole image.")
    fused_index: torch.Tensor = _column(
        Role.IMAGE,
        "(T,) or (T, F) which images stand before each text, in this order, where it is embedded; -1 (the default) "
        "for none.",
        several=True,
    )
    target_row: torch.Tensor = _column(
        Role.TEXT,
        "(T,) which text, with its images if it has any, a text is to find instead of an image or a box; -1 (the "
        "default) for none.",
        pointed_to_as="document",
    )
    memory_row: torch.Tensor = _column(
        Role.TEXT,
        "(T,) which text, with its images, a generated text is about: it is written from the states of the [EMB] "
        "vectors there alone (the compression stage of CoMa, https://arxiv.org/abs/2511.08480); -1 for none. In a "
        "sharded run it is given on all processes or on none.",
        pointed_to_as="memory",
    )
    contrastive_mask: torch.Tensor = _column(
        Role.FLAG,
        "(T,) False for texts that are not compared, such as answers to a question; by default True for those with an "
        "`image_index` or a `target_row`.",
    )
    hard_negative_mask: torch.Tensor = _column(
        Role.FLAG,
        "(T,) True for texts that describe no image: candidates that every image has to tell from its own texts.",
    )
    text_states: torch.Tensor | None = _column(
        Role.STATES,
        "(T, k, H) states of the [EMB] vectors after each text, the `last_hidden_state` of `get_text_features` of a "
        "frozen language model. It is not run; then nothing is generated, and no image stands before a text.",
    )
    reads_memory: bool = False

    @classmethod
    @torch.compiler.disable
    def from_columns(
        cls, columns: Mapping[str, torch.Tensor | None], num_images: int, boxes: torch.Tensor | None
    ) -> "TextRows":
        """Check columns, and complete them with the defaults of those that are missing or None.

        Args:
            columns: By name; `input_ids` and `attention_mask` at least. Other names are passed over.
            num_images: How many images there are to point to.
            boxes: (I, R, 4) the boxes to point to, or None.

        Raises:
            ValueError: If shapes, types or pointers do not fit together.
        """
        given: dict[str, Any] = {name: columns[name] for name in TEXT_COLUMNS if columns.get(name) is not None}
        input_ids, attention_mask = given["input_ids"], given["attention_mask"]
        num_texts, device = len(input_ids), input_ids.device
        if "image_index" not in given:
            if num_images != num_texts:
                raise ValueError(
                    f"`pixel_values` holds {num_images} images and `input_ids` {num_texts} texts; expected pairs, or "
                    "`image_index` to say which image each text describes."
                )
            given["image_index"] = torch.arange(num_texts, device=device)
        none = torch.full((num_texts,), -1, device=device)
        defaults = {name: none for name, column in TEXT_COLUMNS.items() if column.role in _POINTERS}
        defaults["labels"] = input_ids.masked_fill(attention_mask == 0, IGNORED_LABEL)
        defaults["hard_negative_mask"] = torch.zeros_like(none, dtype=torch.bool)
        rows = cls(
            **{name: given.get(name, defaults.get(name)) for name in TEXT_COLUMNS},
            reads_memory="memory_row" in given,
        )
        rows._check_pointers(num_images, boxes)
        if rows.contrastive_mask is None:
            rows.contrastive_mask = (rows.image_index >= 0) | (rows.target_row >= 0)
        rows._check_values()
        return rows

    def _check_pointers(self, num_images: int, boxes: torch.Tensor | None):
        num_texts = len(self.input_ids)
        for name, column in TEXT_COLUMNS.items():
            pointer = getattr(self, name)
            if column.role not in _POINTERS:
                continue
            limit = {Role.IMAGE: num_images, Role.TEXT: num_texts}.get(column.role)
            fits = pointer.shape[:1] == (num_texts,) and pointer.ndim <= 1 + column.several
            if not fits or pointer.is_floating_point() or (limit is not None and _is_outside(pointer, limit)):
                numbers = "lists of numbers" if column.several and pointer.ndim > 1 else "numbers"
                below = "" if limit is None else f" below {limit}"
                raise ValueError(
                    f"`{name}` is {pointer.tolist()}; expected {num_texts} {numbers}{below}, or -1 for none."
                )
            if column.several and pointer.ndim == 1:
                setattr(self, name, pointer[:, None])  # (T, 1)
        if boxes is None and (self.box_index >= 0).any():
            raise ValueError(
                f"`box_index` is {self.box_index.tolist()}, but `boxes` is None; expected the boxes it points to."
            )
        if not self._points_to_boxes(boxes):
            raise ValueError(
                f"`box_index` is {self.box_index.tolist()}; expected {num_texts} numbers, each of a box of the text's "
                "image that is no padding, or -1 for none."
            )

    def _points_to_boxes(self, boxes: torch.Tensor | None) -> bool:
        if boxes is None:
            return True
        if (self.box_index >= boxes.shape[1]).any():
            return False
        is_region = (self.box_index >= 0) & (self.image_index >= 0)  # (T,)
        return bool(is_box(boxes)[self.image_index[is_region], self.box_index[is_region]].all())

    def _check_values(self):
        num_texts, shape = len(self.input_ids), self.input_ids.shape
        for name, column in TEXT_COLUMNS.items():
            value = getattr(self, name)
            if column.role is Role.TOKENS and value.shape != shape:
                raise ValueError(
                    f"`{name}` has shape {tuple(value.shape)}; expected that of `input_ids`, {tuple(shape)}."
                )
            if column.role is Role.FLAG and (value.dtype != torch.bool or value.shape != (num_texts,)):
                raise ValueError(
                    f"`{name}` is {value.dtype} of shape {tuple(value.shape)}; expected ({num_texts},) torch.bool."
                )
        if self.text_states is not None and (self.text_states.ndim != 3 or len(self.text_states) != num_texts):
            raise ValueError(f"`text_states` has shape {tuple(self.text_states.shape)}; expected ({num_texts}, k, H).")
        without_target = (self.image_index < 0) & (self.target_row < 0)
        if (self.contrastive_mask & without_target).any():
            raise ValueError(
                "`contrastive_mask` is True for a text whose `image_index` is -1; expected an image, or a "
                "`target_row`, for it."
            )

    @property
    def is_generated(self) -> torch.Tensor:
        """(T,) bool"""
        return (self.labels != IGNORED_LABEL).any(-1)

    @property
    def is_recalled(self) -> torch.Tensor:
        """(T,) bool, the texts that are generated from a memory."""
        return self.is_generated & (self.memory_row >= 0)

    @property
    def is_document(self) -> torch.Tensor:
        """(T,) bool, the texts that queries were written for."""
        return self._pointed_to(self.target_row[self.contrastive_mask])

    @property
    def is_embedded(self) -> torch.Tensor:
        """(T,) bool"""
        return self.contrastive_mask | self.is_document | self._pointed_to(self.memory_row[self.is_generated])

    def _pointed_to(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(self.contrastive_mask).index_fill(0, rows[rows >= 0], True)


TEXT_COLUMNS: dict[str, Column] = {
    entry.name: entry.metadata["column"] for entry in fields(TextRows) if "column" in entry.metadata
}
_POINTERS = (Role.IMAGE, Role.BOX, Role.TEXT)


def _is_outside(pointer: torch.Tensor, limit: int) -> bool:
    return bool(((pointer >= limit) | (pointer < -1)).any())


def pointers(inputs: Mapping[str, Any], role: Role) -> dict[str, torch.Tensor]:
    """Those columns of a batch that point to images, or to texts."""
    return {name: inputs[name] for name, column in TEXT_COLUMNS.items() if column.role is role and name in inputs}


def select_texts(inputs: Mapping[str, Any], texts: torch.Tensor, images: range) -> dict[str, torch.Tensor]:
    """The columns of some texts of a batch, with pointers that count among these texts and images.

    Args:
        inputs: The batch.
        texts: (S,) long, the numbers of the texts.
        images: Those that stay; all that the texts point to.

    Returns:
        The columns that the batch has.

    Raises:
        ValueError: If a text points to an image or a text that is not among them.
    """
    numbers = {  # new number of each image, and of each text; -1 for what does not stay
        Role.IMAGE: _renumbering(torch.arange(images.start, images.stop, device=texts.device), images.stop),
        Role.TEXT: _renumbering(texts, len(inputs["input_ids"])),
    }
    selected = {}
    for name, column in TEXT_COLUMNS.items():
        if name not in inputs:
            continue
        value = inputs[name][texts]
        if column.role in numbers:
            is_pointer, new = value >= 0, numbers[column.role]
            is_lost = is_pointer & (value >= len(new))
            value = torch.where(is_pointer & ~is_lost, new[value.clamp(min=0, max=len(new) - 1)], -1)
            if (is_pointer & (value < 0)).any():
                kind = "an image" if column.role is Role.IMAGE else "a text"
                raise ValueError(f"`{name}` points to {kind} that is not selected; expected one that is.")
        selected[name] = value
    return selected


def _renumbering(kept: torch.Tensor, size: int) -> torch.Tensor:
    """(K,) numbers below `size` -> (size + 1,), for each number its place among them, or -1."""
    numbers = kept.new_full((size + 1,), -1)  # the last one is that of nothing, so that it is never empty
    numbers[kept] = torch.arange(len(kept), device=kept.device)
    return numbers


def documents_text_columns(documented: Any) -> Any:
    """A decorator that writes the columns into the docstring of a function or class, where it has `{columns}`.

    Those that are parameters of the function are left out: it says itself what they mean.
    """
    code = getattr(documented, "__code__", None)
    parameters = () if code is None else code.co_varnames[: code.co_argcount]
    lines = (documented.__doc__ or "").split("\n")
    for number, line in enumerate(lines):
        if line.strip() == "{columns}":
            margin = line[: line.index("{")]
            columns = {name: column for name, column in TEXT_COLUMNS.items() if name not in parameters}
            texts = [f"{name}: {column.description}" for name, column in columns.items()]
            lines[number] = "\n".join(
                fill(text, 119, initial_indent=margin, subsequent_indent=margin + " " * 4) for text in texts
            )
    documented.__doc__ = "\n".join(lines)
    return documented


documents_text_columns(TextRows)
