"""The texts of a joint step, and what each of them is for."""

from dataclasses import dataclass

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


@dataclass
class TextRows:
    """
    The T texts of a joint step, and what each of them is for; see `MMGEMModel.forward`.

    Args:
        input_ids, attention_mask, labels: (T, L).
        image_index, box_index, fused_index, target_row, memory_row: (T,) long, -1 for none.
        contrastive_mask, hard_negative_mask: (T,) bool.
        reads_memory: whether any text of any process may be generated from a memory.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    image_index: torch.Tensor
    box_index: torch.Tensor
    fused_index: torch.Tensor
    target_row: torch.Tensor
    memory_row: torch.Tensor
    contrastive_mask: torch.Tensor
    hard_negative_mask: torch.Tensor
    reads_memory: bool

    @classmethod
    def complete(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        num_images: int,
        boxes: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        contrastive_mask: torch.Tensor | None = None,
        hard_negative_mask: torch.Tensor | None = None,
        memory_row: torch.Tensor | None = None,
        **indices: torch.Tensor | None,
    ) -> "TextRows":
        """With the defaults of what was not given; `indices` are `box_index`, `fused_index` and `target_row`.

        Raises:
            ValueError: if numbers or indices do not fit together.
        """
        num_texts, device = len(input_ids), input_ids.device
        none = torch.full((num_texts,), -1, device=device)
        if image_index is None:
            if num_images != num_texts:
                raise ValueError(
                    f"`pixel_values` holds {num_images} images and `input_ids` {num_texts} texts; expected pairs, or "
                    "`image_index` to say which image each text describes."
                )
            image_index = torch.arange(num_texts, device=device)
        rows = cls(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=input_ids.masked_fill(attention_mask == 0, IGNORED_LABEL) if labels is None else labels,
            image_index=image_index,
            contrastive_mask=image_index >= 0 if contrastive_mask is None else contrastive_mask,
            hard_negative_mask=torch.zeros_like(none, dtype=torch.bool)
            if hard_negative_mask is None
            else hard_negative_mask,
            memory_row=none if memory_row is None else memory_row,
            reads_memory=memory_row is not None,
            **{name: none if index is None else index for name, index in indices.items()},
        )
        rows._check_indices(num_images, boxes)
        if contrastive_mask is None:
            rows.contrastive_mask = (rows.image_index >= 0) | (rows.target_row >= 0)
        rows._check_masks()
        return rows

    def _check_indices(self, num_images: int, boxes: torch.Tensor | None):
        num_texts = len(self.input_ids)
        limits = {
            "image_index": num_images,
            "fused_index": num_images,
            "target_row": num_texts,
            "memory_row": num_texts,
        }
        for name, limit in limits.items():
            index = getattr(self, name)
            if index.shape != (num_texts,) or (index >= limit).any():
                raise ValueError(
                    f"`{name}` is {index.tolist()}; expected {num_texts} numbers below {limit}, or -1 for none."
                )
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
        if self.box_index.shape != (len(self.input_ids),):
            return False
        if boxes is None:
            return True
        if (self.box_index >= boxes.shape[1]).any():
            return False
        is_region = (self.box_index >= 0) & (self.image_index >= 0)  # (T,)
        return bool(is_box(boxes)[self.image_index[is_region], self.box_index[is_region]].all())

    def _check_masks(self):
        num_texts = len(self.input_ids)
        if self.labels.shape != self.input_ids.shape:
            raise ValueError(
                f"`labels` has shape {tuple(self.labels.shape)}; expected that of `input_ids`, "
                f"{tuple(self.input_ids.shape)}."
            )
        for name in ("contrastive_mask", "hard_negative_mask"):
            mask = getattr(self, name)
            if mask.dtype != torch.bool or mask.shape != (num_texts,):
                raise ValueError(
                    f"`{name}` is {mask.dtype} of shape {tuple(mask.shape)}; expected ({num_texts},) torch.bool."
                )
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
    def is_document(self) -> torch.Tensor:
        """(T,) bool, the texts that queries were written for."""
        return self._pointed_to(self.target_row[self.contrastive_mask])

    @property
    def is_embedded(self) -> torch.Tensor:
        """(T,) bool"""
        return self.contrastive_mask | self.is_document | self._pointed_to(self.memory_row[self.is_generated])

    def _pointed_to(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(self.contrastive_mask).index_fill(0, rows[rows >= 0], True)
