"""A search index in memory, asked with text, images, or both; `building` makes it, `storage` keeps it."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmgem.processing.image_loading import load_image
from mmgem.training.data.image_files import shorter_side_for
from mmgem.training.inference import Box, as_list, embed_fused, embed_images, embed_regions, embed_texts
from mmgem.training.loading import load_checkpoint
from mmgem.training.search.conditions import Condition
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.hybrid import RANKED, fuse_ranks
from mmgem.training.search.inverted_lists import InvertedLists
from mmgem.training.search.row_search import Hit, RowSearch, check_says_something, check_top, is_whole, read_finished
from mmgem.training.search.storage import IndexFacts, IndexRows
from mmgem.training.search.vector_search import VectorSearch
from mmgem.training.similarity_maps import SimilarityMap, similarity_map


class SearchIndex(RowSearch):
    """An index in memory, with the model that answers queries from it.

    Args:
        rows: The rows of the index.
        facts: What is known of them.
        model: The `MMGEMModel` that embedded them.
        processor: Its `MMGEMProcessor`.
        lists: The lists of an index whose vectors stay on the disk.
    """

    def __init__(self, rows: IndexRows, facts: IndexFacts, model, processor, lists: InvertedLists | None = None):
        super().__init__(rows, facts)
        self.model, self.processor = model, processor
        codes = rows.arrays["embedding"]
        self.vectors = VectorSearch(codes[:] if lists is None else codes, facts.codec, lists)
        self._checked: set[str] = set()

    @classmethod
    def load(cls, path: str | Path, model=None, processor=None) -> "SearchIndex":
        """Reads an index from disk.

        Settings, weights, and what the model makes of a text are compared with those of the model that built it; what
        it makes of an image, before the first query with one. So no vision tower runs if there is none.

        Args:
            path: What `build_index` wrote.
            model, processor: The model that built it; by default loaded from where it was loaded then.

        Raises:
            FileNotFoundError: If there is no such folder, or the model is not where it was.
            ValueError: If the folder is not an index, or a damaged one, another model is given than the one that built
                it, or a model without its processor.
        """
        stored = read_finished(path)
        if (model is None) != (processor is None):
            given, missing = ("model", "processor") if processor is None else ("processor", "model")
            raise ValueError(f"`{missing}` is None, but `{given}` is not; expected both, or neither.")
        if model is None:
            model, processor = load_checkpoint(stored.facts.model)
        assert stored.rows is not None
        index = cls(stored.rows, stored.facts, model, processor, None if stored.lists is None else stored.lists.read())
        index._check("weights", *(kind for kind in model.config.embedded_kinds if kind == "text"))
        return index

    @cached_property
    def _shorter_side(self) -> int:
        return shorter_side_for(self.processor)

    def search(
        self,
        text: str | None = None,
        image: Any = None,
        top: int = 10,
        boxes: Sequence[Box] | None = None,
        prompt: str | None = None,
        vectors: int | None = None,
        query_vectors: int | None = None,
        kinds: Iterable[str] | None = None,
        where: Sequence[Condition] | None = None,
        lexical_weight: float | None = None,
    ) -> list[Hit]:
        """Searches the rows nearest to a query: images, regions, captions and texts, as far as the index has them.

        Args:
            text: What to look for; with an image, what is said about the image (read after it, by the language model).
            image: A picture of any kind `load_image` takes; with a text also a list of them.
            top: The number of answers; fewer if fewer rows are searched.
            boxes: Of the image, the part that is looked for, or, with a text, the parts that it speaks about:
                `[x0, y0, x1, y1]` in pixels.
            prompt: Name of the model's prompt that is put before the text.
            vectors: How many of the first vectors of each image are compared, in an index with several; by default
                all. Nothing is embedded again: they are what an index with fewer vectors has.
            query_vectors: Likewise of the query; by default as many as of an image.
            kinds: The kinds of rows that are searched, see `Item`; by default all.
            where: Conditions that hold for all answers.
            lexical_weight: For a hybrid search the weight of the words, from 0 to 1, beside that of the vectors (see
                `fuse_ranks`; 0.5 if nothing is known, or see `fit_lexical_weight`). The words of a row are those of
                its text or captions and of the name of its file.

        Returns:
            The answers, best first. The score of a hybrid search is not a cosine, but that of `fuse_ranks`.

        Raises:
            FileNotFoundError, TypeError, ValueError: If `image` or `boxes` cannot be read, see `load_image` and
                `check_boxes`; if neither text nor image is given; for a name that is not among the model's prompts,
                kinds or names that no row has, or numbers that are out of range; or if the model embeds otherwise
                than it did.
        """
        limits = self._limits(text, top, kinds, where, vectors, lexical_weight)
        return self._answer(self.query(text, image, boxes, prompt, vectors, query_vectors)[0], text, *limits)

    def search_texts(
        self,
        texts: Sequence[str],
        top: int = 10,
        prompt: str | None = None,
        vectors: int | None = None,
        query_vectors: int | None = None,
        kinds: Iterable[str] | None = None,
        where: Sequence[Condition] | None = None,
        lexical_weight: float | None = None,
    ) -> list[list[Hit]]:
        """Searches for each of several texts, which are embedded together.

        Arguments, answers and errors are those of [`search`], which finds the same.
        """
        texts = as_list(texts, "texts")
        if not texts:
            raise ValueError("`texts` is empty; expected at least one text.")
        limits = self._limits(texts[0], top, kinds, where, vectors, lexical_weight)
        for text in texts:
            check_says_something(text)
        query_vectors = self._query_vectors(vectors, query_vectors)
        prompted = texts if prompt is None else [self._prompt(prompt, text) for text in texts]
        queries = self._finish(embed_texts(self.model, self.processor, prompted), query_vectors)
        return [self._answer(query, text, *limits) for query, text in zip(queries, texts, strict=True)]

    def nearest(
        self,
        query: torch.Tensor,
        top: int = 10,
        kinds: Iterable[str] | None = None,
        where: Sequence[Condition] | None = None,
    ) -> list[Hit]:
        """Searches the rows nearest to an embedding, such as the sum of two that [`query`] gives.

        Args:
            query: (1, D) or (1, k, D), of unit length, as wide as the vectors of the index.
            top, kinds, where: As for [`search`].

        Raises:
            ValueError: If `query` is none such; and as [`search`].
        """
        width, is_query = self.facts.settings.dimensions, isinstance(query, torch.Tensor)
        fits = is_query and query.ndim in (2, 3) and (len(query), query.shape[-1]) == (1, width) and not query.is_meta
        if not (fits and query.isfinite().all()):
            what = f"of shape {tuple(query.shape)}" if is_query else f"a {type(query).__name__}"
            raise ValueError(f"`query` is {what}; expected a finite tensor, (1, {width}) or (1, k, {width}).")
        return self._answer(query[0].detach().float().cpu(), None, *self._limits(None, top, kinds, where, None, None))

    def query(
        self,
        text: str | None = None,
        image: Any = None,
        boxes: Sequence[Box] | None = None,
        prompt: str | None = None,
        vectors: int | None = None,
        query_vectors: int | None = None,
    ) -> torch.Tensor:
        """The embedding that [`search`] compares with the images; arguments and errors as there.

        Returns:
            (1, D) or (1, k, D), of unit length.
        """
        if text is None and image is None:
            raise ValueError("`text` and `image` are both None; expected at least one of them.")
        if image is None and text is not None:
            check_says_something(text)
        query_vectors = self._query_vectors(vectors, query_vectors)
        if prompt is not None:
            text = self._prompt(prompt, text)
        return self._finish(self._embed_query(text, image, boxes), query_vectors)

    def explain(self, row: int, query: torch.Tensor, vectors: int | None = None) -> tuple[Image.Image, SimilarityMap]:
        """Say why a whole image is found, from its file.

        Args:
            row: Its number in the index.
            query: As [`query`] embeds it.
            vectors: As for [`search`].

        Returns:
            The picture, as it was read for the index, and the shares of its patches in its score; they sum to what
            `float32` vectors score.

        Raises:
            FileNotFoundError, ValueError: If the file is gone or cannot be read; as `similarity_map`; if the model
                embeds images otherwise than it did; for a row whose vector is not that of an image alone.
        """
        if not is_whole(row) or not 0 <= row < len(self):
            raise ValueError(f"`row` is {row!r:.80}; expected 0 to {len(self) - 1}.")
        kind, mode = self.rows.table["kind"][row].as_py(), self.facts.settings.image_mode
        if kind != "image" or mode != "image":
            raise ValueError(
                f"`row` is {row}, of the kind {kind!r} with `image_mode` {mode!r}; expected 'image' for both."
            )
        self._check("image")
        [picture] = _load_all([self.path(row)], self._shorter_side, self.processor.allow_urls)
        vectors = self._count("vectors", vectors, self.facts.settings.vectors or 0) or self.facts.settings.vectors
        return picture, similarity_map(self.model, self.processor, picture, query, vectors)

    def memory(self, rows: Sequence[int]) -> torch.Tensor:
        """Reads the memories of some images.

        Returns:
            (B, J, H) float16.

        Raises:
            ValueError: If the index has none.
        """
        self.check_memory()
        count = len(self.rows.arrays.get("memory", ()))
        if bad := [row for row in rows if not is_whole(row) or not 0 <= row < count]:
            raise ValueError(f"`rows` holds {bad[0]}, which is no whole image; expected rows that have a memory.")
        return torch.tensor(self.rows.arrays["memory"][rows])

    def _limits(
        self,
        text: str | None,
        top: int,
        kinds: Iterable[str] | None,
        where: Sequence[Condition] | None,
        vectors: int | None,
        lexical_weight: float | None,
    ) -> tuple[int, np.ndarray | None, int | None, float | None]:
        """What `_answer` takes besides a query, checked."""
        check_top(top)
        if lexical_weight is not None and text is None:
            raise ValueError(f"`lexical_weight` is {lexical_weight}, but there is no `text`; expected one.")
        if lexical_weight is not None and (isinstance(lexical_weight, bool) or not 0 <= lexical_weight <= 1):
            raise ValueError(f"`lexical_weight` is {lexical_weight}; expected 0 to 1, or None.")
        return top, self._select(kinds, where), vectors, lexical_weight

    def _answer(
        self,
        query: torch.Tensor,
        text: str | None,
        top: int,
        selected: np.ndarray | None,
        vectors: int | None,
        lexical_weight: float | None,
    ) -> list[Hit]:
        """The answers to one query, (D,) or (k, D), best first."""
        depth = top if lexical_weight is None else max(top, RANKED)
        scores, rows = self.vectors.search(query.numpy(), depth, vectors, selected)
        if lexical_weight is not None:
            rankings = (self._lexical_search.rank(text or "", depth, selected), rows)
            scores, rows = fuse_ranks(rankings, (lexical_weight, 1 - lexical_weight), top)
        return [self._hit(float(score), int(row)) for score, row in zip(scores, rows, strict=True)]

    def _check(self, *kinds: str) -> None:
        """Compares what the model makes of probes with what it made of them, once."""
        if self._checked.issuperset(kinds):
            return
        fingerprint = Fingerprint.take(self.model, self.processor, kinds)
        if difference := self.facts.fingerprint.difference(fingerprint):
            raise ValueError(
                f"`model` is {self.model.name_or_path!r}, {difference}, compared with {self.facts.model!r} when it "
                f"made the index of {self.facts.folder!r}; expected the same model, or an index made anew."
            )
        self._checked |= {*kinds}

    def _count(self, name: str, count: int | None, limit: int) -> int | None:
        if count is None:
            return None
        if self.facts.settings.vectors is None:
            raise ValueError(f"`{name}` is {count}, but the index has a single vector of each image; expected None.")
        if not 1 <= count <= limit:
            raise ValueError(f"`{name}` is {count}; expected 1 to {limit}.")
        return count

    def _query_vectors(self, vectors: int | None, query_vectors: int | None) -> int | None:
        """How many vectors a query has."""
        vectors = self._count("vectors", vectors, self.facts.settings.vectors or 0)
        count = vectors if query_vectors is None else query_vectors
        return self._count("query_vectors", count, self.model.config.num_embedding_tokens)

    def _finish(self, embeds: torch.Tensor, query_vectors: int | None) -> torch.Tensor:
        """Embeddings of queries as they are compared."""
        queries = self.facts.settings.shorten(embeds, query_vectors)
        if not queries.isfinite().all():
            raise ValueError("the query is embedded as NaN or infinite values; expected finite ones.")
        return queries

    def _prompt(self, name: str, text: str | None) -> str:
        """The text with the prompt before it."""
        prompts = self.model.config.prompts or {}
        if name not in prompts:
            known = f"one of {', '.join(map(repr, prompts))}" if prompts else "None, since the model has no prompts"
            raise ValueError(f"`prompt` is {name!r}; expected {known}.")
        if text is None:
            raise ValueError(f"`prompt` is {name!r}, but there is no `text` for it to stand before; expected one.")
        return prompts[name] + text

    def _embed_query(self, text: str | None, image: Any, boxes: Sequence[Box] | None) -> torch.Tensor:
        """(1, D) or (1, k, D)"""
        if image is None:
            if boxes is not None:
                raise ValueError("`boxes` is given, but `image` is None; expected the image that they lie in.")
            assert text is not None
            return embed_texts(self.model, self.processor, [text])
        images = list(image) if isinstance(image, list | tuple) else [image]
        if boxes is not None and len(images) > 1:
            raise ValueError(f"`image` holds {len(images)} images, with `boxes`; expected the one that they lie in.")
        # As the images of the index were read.
        shorter_side = None if boxes is not None else self._shorter_side
        return self._embed_with_images(text, _load_all(images, shorter_side, self.processor.allow_urls), boxes)

    def _embed_with_images(
        self, text: str | None, images: list[Image.Image], boxes: Sequence[Box] | None
    ) -> torch.Tensor:
        if text is None and self.facts.settings.image_mode == "fused":
            text = ""  # as the images of the index were embedded
            self._check_alone(images, boxes)
        self._check("image" if text is None else "fused")
        if text is not None:
            return embed_fused(self.model, self.processor, [images], [text], None if boxes is None else [boxes])
        self._check_alone(images, boxes)
        if boxes is None:
            return embed_images(self.model, self.processor, images)
        return embed_regions(self.model, self.processor, images, [boxes])

    def _check_alone(self, images: list[Image.Image], boxes: Sequence[Box] | None) -> None:
        """Refuses several images or boxes, of which no text says what they are together."""
        if len(images) > 1 or (boxes is not None and len(boxes) > 1):
            parts = f"`image` holds {len(images)} images" if boxes is None else f"`boxes` holds {len(boxes)} boxes"
            raise ValueError(f"{parts}, without a `text` that speaks about them; expected one.")


def _load_all(images: Iterable[Any], shorter_side: int | None, allow_urls: bool | list[str]) -> list[Image.Image]:
    images = [load_image(image, shorter_side=shorter_side, allow_urls=allow_urls) for image in images]
    if not images:
        raise ValueError("`image` is empty; expected at least one picture.")
    return images
