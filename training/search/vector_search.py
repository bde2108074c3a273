"""Search among the stored vectors of many images."""

from functools import cached_property
from typing import Any

import faiss
import numpy as np
import torch

from mmgem.late_interaction import maxsim
from mmgem.training.search.inverted_lists import COMPARED_ALL, InvertedLists
from mmgem.training.search.storage import ArrayFile
from mmgem.training.search.vector_codec import VectorCodec

# Codes choose this many candidates for each answer, and the query as it is chooses among those.
RESCORED_PER_ANSWER = 10
_VALUES_AT_A_TIME = 1 << 24  # decoded for MaxSim, or of products


class VectorSearch:
    """Vectors of N images, in memory, or on the disk with lists that choose candidates among them.

    Without lists one vector per image is searched by FAISS; its codes first choose candidates, see
    `RESCORED_PER_ANSWER`. Several are compared with the query one and all, by MaxSim, and so are the candidates that
    lists choose.

    Args:
        codes: (N, W), or (N, R, W) for R vectors per image, as `codec` encodes them.
        codec: How they are stored.
        lists: Their lists, if they have some.
    """

    def __init__(self, codes: np.ndarray | ArrayFile, codec: VectorCodec, lists: InvertedLists | None = None):
        self.codec, self.lists, self._is_several = codec, lists, len(codes.shape) == 3
        # FAISS takes a copy; MaxSim reads all at each search, from memory that torch may write to.
        self.codes: Any = np.require(codes, requirements="W") if self._is_several and lists is None else codes

    def __len__(self) -> int:
        return len(self.codes)

    def search(
        self, query: np.ndarray, top: int, vectors: int | None = None, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The images nearest to a query.

        Args:
            query: (D,), or (Q, D) for several vectors; float32, of unit length.
            top: The number of answers; fewer if there are fewer images.
            vectors: How many of the R vectors of each image are compared; by default all.
            rows: (n,) The numbers of the images that are searched, by default all. They are compared one and all,
                unless there are lists and more than `COMPARED_ALL` images.

        Returns:
            Scores and numbers of the images, best first, both (top,). A score is the cosine, or the mean of the
            largest cosine of each vector of the query, with the vectors as they are decoded.
        """
        top = int(min(top, len(self) if rows is None else len(rows)))  # FAISS takes no number of numpy
        if self.lists is not None and (rows is None or len(rows) > COMPARED_ALL):
            rows = self.lists.candidates(query, top, vectors, rows)
        if self._is_several or rows is not None:
            scores, numbers = self.compare(np.atleast_2d(query)[None], top, vectors, rows)
            return scores[0], numbers[0]
        if self.codec.precision == "float32":
            scores, numbers = self._faiss_index.search(query[None], top)
            return scores[0], numbers[0]
        return self._search_codes(query, top)

    def compare(
        self, queries: np.ndarray, top: int, vectors: int | None = None, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compares queries with images one and all.

        Args:
            queries: (B, Q, D) float32, of unit length.
            top, vectors, rows: As for `search`.

        Returns:
            Scores and numbers of the nearest images, best first, both (B, top).
        """
        batch, asking, dimensions = queries.shape
        # MaxSim is the mean of that of each vector of the query alone, of which one product has all.
        alone = torch.from_numpy(queries).reshape(-1, 1, dimensions)  # (B * Q, 1, D)
        per_image = self.codes.shape[1] if self._is_several else 1
        images = max(1, _VALUES_AT_A_TIME // (per_image * max(dimensions, batch * asking)))
        best = torch.empty(batch, 0), torch.empty(batch, 0, dtype=torch.int64)
        for start in range(0, len(self) if rows is None else len(rows), images):
            part = slice(start, start + images)
            codes = self.codes[part if rows is None else rows[part]]
            decoded = self.codec.decode(codes[:, :vectors] if self._is_several else codes[:, None])  # (n, r, D)
            some = torch.from_numpy(np.require(decoded, requirements="W"))
            scores = maxsim(alone, some).view(batch, asking, -1).mean(dim=1)  # (B, n)
            numbers = (torch.arange(start, start + len(some)) if rows is None else torch.from_numpy(rows[part])).long()
            joined = torch.cat([best[0], scores], 1), torch.cat([best[1], numbers.expand(batch, -1)], 1)
            nearest = joined[0].topk(min(top, joined[0].shape[1]))
            best = nearest.values, joined[1].gather(1, nearest.indices)
        return best[0].numpy(), best[1].numpy()

    @cached_property
    def _faiss_index(self):
        """Exact; it holds the codes as they are."""
        index: Any
        if self.codec.precision == "binary":
            index = faiss.IndexBinaryFlat(8 * self.codec.width)
        elif self.codec.precision == "int8":
            # Of unit vectors the nearest has the largest dot product; and distances are the same between codes.
            index = faiss.IndexScalarQuantizer(
                self.codec.dimensions, faiss.ScalarQuantizer.QT_8bit_direct, faiss.METRIC_L2
            )
        else:
            index = faiss.IndexFlatIP(self.codec.dimensions)
        rows = max(1, _VALUES_AT_A_TIME // self.codec.width)
        for start in range(0, len(self), rows):  # FAISS makes float32 of bytes on their way
            index.add(self.codes[start : start + rows])
        return index

    def _search_codes(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        candidates = min(RESCORED_PER_ANSWER * top, len(self))
        _, [numbers] = self._faiss_index.search(self.codec.encode(query)[None], candidates)
        scores = self.codec.decode(self.codes[numbers]) @ query
        best = np.argsort(-scores, kind="stable")[:top]
        return scores[best], numbers[best]
