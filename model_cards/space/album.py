"""What the Space does with a folder of photographs, without the pages around it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch.nn.functional import normalize

from mmgem.processing.image_loading import load_image
from mmgem.training.demo.photographs import as_prose
from mmgem.training.inference import classify, generate_answers, generate_captions, generate_region_captions
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.row_search import Hit
from mmgem.training.similarity_maps import similarity_map

MAX_PIXELS = 1 << 26  # of a picture that is uploaded
REGION_GRID = 3  # each photograph is searched in so many rows and columns of regions, too
DIM = 0.35  # how bright a photograph is around its region


class Album:
    """Photographs in an index, with the model that searches them and writes about them.

    Args:
        folder: Where the photographs are, at any depth.
        index_folder: A new folder for the index, or the index of an earlier start, which is brought up to date.
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.

    Raises:
        FileNotFoundError, ValueError: As `build_index`.
    """

    def __init__(self, folder: str | Path, index_folder: str | Path, model, processor):
        build_index(folder, model, processor, index_folder, regions=REGION_GRID)
        self.index = SearchIndex.load(index_folder, model, processor)
        self.model, self.processor = model, processor
        kinds = self.index.rows.table["kind"].to_pylist()
        self.photographs = [self.index.path(row) for row, kind in enumerate(kinds) if kind == "image"]

    @property
    def has_heat_maps(self) -> bool:
        """Whether the model compares images by what their patches show, see `MMGEMModel.similarity_map`."""
        return self.model.config.embedding_prompt_ids is None

    def query(self, words: str = "", picture: Any = None, box: Sequence[float] | None = None) -> torch.Tensor:
        """Embed what is looked for.

        Args:
            words: What to look for.
            picture: A picture that is looked for; with words, both count alike.
            box: The part of the picture that is looked for, `[x0, y0, x1, y1]` in pixels.

        Returns:
            (1, D) or (1, k, D), of unit length.

        Raises:
            ValueError: If there are neither words nor a picture, or as `SearchIndex.query`.
        """
        parts = [self.index.query(words)] if words.strip() or picture is None else []
        if picture is not None:
            parts.append(self.index.query(image=picture, boxes=None if box is None else [box]))
        return normalize(torch.stack(parts).sum(dim=0), dim=-1)

    def nearest(self, query: torch.Tensor, top: int, kind: str = "image", but: Path | None = None) -> list[Hit]:
        """The photographs nearest to a query, other than one; of the kind "region" the nearest part of each."""
        rows = self.index.nearest(query, len(self.index), [kind])
        best = {hit.path: hit for hit in reversed(rows) if hit.path != but}
        return sorted(best.values(), key=lambda hit: hit.score, reverse=True)[:top]

    def heat_map(self, picture: Any, query: torch.Tensor) -> Image.Image:
        """A picture in which what is like the query glows."""
        picture = load_picture(picture)
        return similarity_map(self.model, self.processor, picture, query).draw(picture)

    def caption(self, picture: Any, box: Sequence[float] | None = None) -> str:
        """Write the caption of a picture, or of a box `[x0, y0, x1, y1]` in it, in pixels."""
        if box is None:
            return as_prose(generate_captions(self.model, self.processor, [picture])[0])
        return as_prose(generate_region_captions(self.model, self.processor, [picture], [[box]])[0])

    def classify(self, picture: Any, labels: Sequence[str]) -> dict[str, float]:
        """How probable each of some labels is for a picture, if one of them is right.

        Raises:
            ValueError: If there are fewer than two different labels.
        """
        labels = list(dict.fromkeys(filter(None, (label.strip() for label in labels))))
        if len(labels) < 2:
            raise ValueError(f"`labels` holds {len(labels)}; expected two or more, to choose from.")
        texts = [f"a picture of {label}" for label in labels]
        return dict(zip(labels, classify(self.model, self.processor, [picture], texts)[0].tolist(), strict=True))

    def answer(self, picture: Any, question: str) -> str:
        """Write the answer to a question about a picture."""
        if not question.strip():
            raise ValueError(f"`question` is {question!r}; expected one.")
        return generate_answers(self.model, self.processor, [picture], [question])[0]


def load_picture(source: Any, side: int | None = None) -> Image.Image:
    """Load a picture as a person sees it, in full or with at most so many pixels on its longer side."""
    picture = load_image(source, max_pixels=MAX_PIXELS, shorter_side=side)
    if side is not None:
        picture.thumbnail((side, side))
    return picture


def read_box(corners: str) -> list[float]:
    """Read the numbers of a text such as "10, 20, 110, 90"."""
    try:
        box = [float(edge) for edge in corners.split(",")]
    except ValueError:
        box = []
    if len(box) != 4:
        raise ValueError(f"the box is {corners!r}; expected four numbers, left, top, right, bottom.")
    return box


def outline(picture: Image.Image, box: Sequence[float]) -> Image.Image:
    """Return a copy that is dark around a box `[x0, y0, x1, y1]` in pixels."""
    corners = [round(edge) for edge in box]
    framed = Image.blend(Image.new("RGB", picture.size), picture, DIM)
    framed.paste(picture.crop(corners), corners[:2])
    ImageDraw.Draw(framed).rectangle(corners, outline="white", width=max(2, max(picture.size) // 150))
    return framed
