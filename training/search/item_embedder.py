"""The vectors and memories of the items of an index, written into parts of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import count, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mmgem.training.data.image_files import Skipped, apply_to_batch
from mmgem.training.inference import (
    batch_of,
    embed_and_remember,
    embed_fused,
    embed_images,
    embed_regions,
    embed_texts,
    tower_runs_once,
)
from mmgem.training.search.items import WHOLE_IMAGES, Item, cell_of_grid
from mmgem.training.search.settings import IndexSettings
from mmgem.training.search.storage import next_part, write_part

ROWS_PER_PART = 256  # what a killed run loses at most


class ReadItem(NamedTuple):
    """An item whose file was read.

    Args:
        item: The item.
        content: See `content_of`.
        image: The picture of its file, if that is an image and was read.
        size: Width and height of the picture as it is not scaled down, in pixels.
        inputs: Of the model, if they were prepared with the picture, see `prepare`.
    """

    item: Item
    content: str
    image: Image.Image | None = None
    size: tuple[int, int] | None = None
    inputs: Mapping[str, torch.Tensor] | None = None

    @property
    def file_name(self) -> str:
        """The name of the item in reports."""
        return self.item.name


class ItemEmbedder:
    """Embeds items into parts of an index, each of which is there as a whole or not at all.

    Args:
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        settings: The settings of the index.
        place: The folder of the parts.
        skipped: Receives the items that cannot be embedded.
    """

    def __init__(self, model, processor, settings: IndexSettings, place: Path, skipped: list[Skipped]):
        self.model, self.processor, self.settings = model, processor, settings
        self._place, self._skipped = place, skipped
        self._part_numbers = count(next_part(place))
        self.written = 0  # parts
        self._rows: list[dict[str, Any]] = []
        self._embedders: dict[str, Callable[[list[ReadItem]], list[dict[str, np.ndarray]]]] = {
            "image": self._embed_images,
            "fused": self._embed_fused,
            "region": self._embed_regions,
            "text": self._embed_texts,
        }

    def prepare(self, image: Image.Image) -> Mapping[str, torch.Tensor] | None:
        """Makes a picture the input of the model, where it is embedded as it is; whoever reads files does so ahead."""
        settings = self.settings
        if settings.image_mode == "fused" or settings.captions == "fused" or settings.memory is not None:
            return None
        return self.processor(images=[image], return_tensors="pt")

    def embed(self, items: Sequence[ReadItem]) -> None:
        """Embeds a batch of items."""
        self._rows += self.embed_rows(items)
        if len(self._rows) >= ROWS_PER_PART:
            self.write()

    def embed_rows(self, items: Sequence[ReadItem]) -> list[dict[str, Any]]:
        """Embeds a batch of items; returns a row for each that can be embedded."""
        rows: list[dict[str, Any]] = []
        groups = [list(group) for _, group in groupby(sorted(items, key=_kind), key=_kind)]
        with tower_runs_once(self.model) if self._repeats_images(groups) else nullcontext():
            for group in groups:
                embedded = apply_to_batch(self._embedders[_kind(group[0])], group, self._skipped)
                rows += [self._facts(read) | arrays for read, arrays in embedded]
        return rows

    def write(self) -> None:
        """Writes what was embedded and is in no part yet."""
        if not self._rows:
            return
        rows = sorted(self._rows, key=lambda row: row["kind"] not in WHOLE_IMAGES)  # which have a memory
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[-1]}
        columns["embedding"] = np.stack(columns["embedding"])
        if memories := [row["memory"] for row in rows if "memory" in row]:
            columns["memory"] = np.stack(memories)
        write_part(self._place, next(self._part_numbers), columns)
        self.written += 1
        self._rows.clear()

    def _repeats_images(self, groups: Sequence[Sequence[ReadItem]]) -> bool:
        """Whether the vision tower would run over a picture more than once."""
        of_images = [group for group in groups if group[0].image is not None]
        return len(of_images) > 1 or any(
            _kind(group[0]) == "fused"
            and self.settings.memory is not None
            or _kind(group[0]) == "region"
            and self.settings.image_mode == "fused"
            for group in of_images
        )

    def _facts(self, read: ReadItem) -> dict[str, Any]:
        width, height = read.size or (None, None)
        facts = read.item._asdict() | {"width": width, "height": height, "content": read.content}
        return facts | ({"box": self._box(read)} if read.item.kind == "region" else {})

    def _box(self, read: ReadItem) -> list[float]:
        if read.item.box is not None:
            return read.item.box
        return cell_of_grid(read.item.part, int(self.settings.regions or 0), read.size)  # type: ignore[arg-type]

    def _embed_images(self, group: list[ReadItem]) -> list[dict[str, np.ndarray]]:
        images = [read.image for read in group]
        if self.settings.memory is not None:
            of_images, of_both, memory = embed_and_remember(self.model, self.processor, images)
            return self._arrays(of_images if self.settings.image_mode == "image" else of_both, memory)
        if self.settings.image_mode == "image":
            inputs = batch_of([read.inputs for read in group])
            processor = self.processor if inputs is None else lambda **images: inputs  # what it has prepared ahead
            return self._arrays(embed_images(self.model, processor, images))
        return self._arrays(embed_fused(self.model, self.processor, images, [""] * len(images)))

    def _embed_fused(self, group: list[ReadItem]) -> list[dict[str, np.ndarray]]:
        images, memory = [read.image for read in group], None
        embeds = embed_fused(self.model, self.processor, images, [read.item.text for read in group])
        if self.settings.memory is not None:
            _, _, memory = embed_and_remember(self.model, self.processor, images)
        return self._arrays(embeds, memory)

    def _embed_regions(self, group: list[ReadItem]) -> list[dict[str, np.ndarray]]:
        boxes = [self._box(read) for read in group]
        if self.settings.image_mode == "fused":
            images, texts = [read.image for read in group], [""] * len(group)
            return self._arrays(embed_fused(self.model, self.processor, images, texts, [[box] for box in boxes]))
        by_image = [list(own) for _, own in groupby(zip(group, boxes, strict=True), lambda one: id(one[0].image))]
        images = [own[0][0].image for own in by_image]
        return self._arrays(
            embed_regions(self.model, self.processor, images, [[box for _, box in own] for own in by_image])
        )

    def _embed_texts(self, group: list[ReadItem]) -> list[dict[str, np.ndarray]]:
        return self._arrays(embed_texts(self.model, self.processor, [read.item.text for read in group]))

    def _arrays(self, embeds, memory: torch.Tensor | None = None) -> list[dict[str, np.ndarray]]:
        """The arrays of each row, checked.

        Raises:
            ValueError: For vectors that no query has a cosine with, and a memory that float16 cannot hold.
        """
        embeds = self.settings.shorten(embeds)
        if not embeds.isfinite().all():
            raise ValueError("`embedding` holds values that are NaN or infinite; expected finite ones.")
        if (embeds.norm(dim=-1) < 0.5).any():
            raise ValueError("`embedding` is a vector of zeros; expected one with a direction.")
        rows = [{"embedding": vector} for vector in embeds.numpy()]
        if memory is not None:
            half = memory[:, : self.settings.memory].half()
            if not half.isfinite().all():
                raise ValueError(f"`memory` holds values up to {memory.abs().max():.3g}; expected at most 65504.")
            rows = [row | {"memory": state} for row, state in zip(rows, half.numpy(), strict=True)]
        return rows


def _kind(read: ReadItem) -> str:
    """What the item is embedded with others as."""
    return "text" if read.item.kind == "caption" else read.item.kind
