"""Masks for the texts and images of a batch, drawn where its rows are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.text_rows import is_first_token
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.permutation import hash_numbers
from mmgem.training.data.shared_memory import in_shared_memory

_MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "boxes", "image_index", "box_index")


@dataclass(kw_only=True)
class Reconstruction:
    """Options of the stage. The defaults are those of MoCa's code (https://arxiv.org/abs/2506.23115).

    Args:
        text_mask_ratio: The share of the tokens of a text that are masked, in [0, 1); above 0, at least one token.
        patch_mask_ratio: The same share of the patches of an image.
        patch_loss_weight: The weight of the loss of the patches, above 0; the loss of the tokens has 1.

    Raises:
        ValueError: If a value is out of its range, or nothing is masked.
    """

    text_mask_ratio: float = 0.4
    patch_mask_ratio: float = 0.5
    patch_loss_weight: float = 0.1

    def __post_init__(self):
        for name in ("text_mask_ratio", "patch_mask_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from 0 to below 1.")
        if not self.text_mask_ratio and not self.patch_mask_ratio:
            raise ValueError("`text_mask_ratio` and `patch_mask_ratio` are both 0; expected one above it.")
        if not 0 < self.patch_loss_weight < float("inf"):
            raise ValueError(f"`patch_loss_weight` is {self.patch_loss_weight}; expected a number above 0.")


class MaskingCollator:
    """Makes batches for `MMGEMForReconstruction`: every text after the image that it describes, or is about, with
    masks of both. Hard negatives, which describe no image, stand alone.

    The masks of a row follow from its `draw_seed` where it has one, whoever collates it.

    Args:
        collator: The collator that makes the batches to mask.
        config: The configuration of the model.
        options: How much is masked.
    """

    def __init__(self, collator: MMGEMCollator, config: MMGEMConfig, options: Reconstruction):
        self.collator = collator
        self.patch_size = config.grid.stride
        self.text_config = config.text_config
        self.options = options
        self._special_ids = torch.tensor(collator.processor.tokenizer.all_special_ids)

    @property
    def processor(self):
        """The processor of the collator."""
        return self.collator.processor

    def check(self, row: Mapping[str, Any]) -> None:
        """Refuse a row that would end a run, as [`MMGEMCollator.check`] does."""
        self.collator.check(row)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate and mask rows.

        Args:
            rows: At least one row, see [`MMGEMCollator`].

        Returns:
            `input_ids`, `attention_mask`, `pixel_values`, `boxes`, `image_index`, `box_index` and `row_keys` of the
            collator's batch, as far as there are any; `text_mask` (T, L) and, with images, `patch_mask` (I, rows,
            columns), bool.
        """
        batch, row_of_text = self.collator.collate(rows)
        if "spatial_shapes" in batch:
            raise ValueError(
                "`processor` makes patches of images of many shapes (NaFlex); expected one that makes images of one "
                "shape, whose patches reconstruction can hide."
            )
        inputs = {name: batch[name] for name in (*_MODEL_INPUTS, "row_keys") if name in batch}
        # Of several images before a text, the first one stays there; the others are put back by themselves.
        no_image = torch.full_like(batch["image_index"], -1)  # (T,)
        fused_index = batch["fused_index"][:, 0] if "fused_index" in batch else no_image  # (T,)
        is_fused = fused_index >= 0  # (T,)
        inputs["image_index"] = torch.where(is_fused, fused_index, batch["image_index"])
        inputs["box_index"] = batch["box_index"].masked_fill(is_fused, -1)
        if "hard_negative_mask" in batch:
            for name in ("image_index", "box_index"):
                inputs[name] = inputs[name].masked_fill(batch["hard_negative_mask"], -1)

        generators = [_generator(row.get("draw_seed")) for row in rows]
        maskable = maskable_tokens(
            inputs["input_ids"], inputs["attention_mask"], inputs["image_index"], self.text_config
        )
        maskable &= ~torch.isin(inputs["input_ids"], self._special_ids)  # (T, L)
        masks = [
            _draw(row, self.options.text_mask_ratio, generators[number])
            for row, number in zip(maskable, row_of_text, strict=True)
        ]
        inputs["text_mask"] = torch.stack(masks) if masks else maskable
        if "pixel_values" in batch:
            sides = zip(batch["pixel_values"].shape[2:], self.patch_size, strict=True)
            every_patch = torch.ones([size // patch_size for size, patch_size in sides], dtype=torch.bool)
            row_of_image = [number for number, row in enumerate(rows) for _ in self.collator.pictures_of(row)]
            inputs["patch_mask"] = torch.stack(
                [_draw(every_patch, self.options.patch_mask_ratio, generators[number]) for number in row_of_image]
            )
        return in_shared_memory(inputs)


def maskable_tokens(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, image_index: torch.Tensor, text_config
) -> torch.Tensor:
    """Find the tokens that can be predicted from one before them.

    Args:
        input_ids: (T, L) long.
        attention_mask: (T, L), padded on either side.
        image_index: (T,) long, -1 for texts before which no image stands.
        text_config: The configuration of the language model, which knows [BOS].

    Returns:
        (T, L) bool.
    """
    is_token = attention_mask.bool()
    is_first = is_token & (is_token.cumsum(-1) == 1)
    is_bos = is_first_token(input_ids, attention_mask, text_config.bos_token_id)
    return is_token & ~is_bos & ~(is_first & (image_index < 0)[:, None])


def _generator(seed: int | None) -> torch.Generator | None:
    """A generator of other numbers than the collator draws with the same seed."""
    return None if seed is None else torch.Generator().manual_seed(hash_numbers(seed, 1))


def _draw(candidates: torch.Tensor, share: float, generator: torch.Generator | None) -> torch.Tensor:
    """A mask of a share of the True places in `candidates`, a bool of any shape; at least one, where there are any."""
    places = candidates.flatten().nonzero()[:, 0]
    count = max(1, round(share * len(places))) if share else 0
    chosen = places[torch.randperm(len(places), generator=generator)[:count]]
    return torch.zeros_like(candidates).flatten().index_fill(0, chosen, True).view_as(candidates)
