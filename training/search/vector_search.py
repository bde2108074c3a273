"""Search among the stored vectors of many images."""

from functools import cached_property
from typing import Any

import faiss
import numpy as np
import torch

from mmgem.late_interaction import maxsim
from mmgem.training.search.vector_codec import VectorCodec

# Codes choose this many candidates for each answer, and the query as it is chooses among those.
RESCORED_PER_ANSWER = 10
_VALUES_AT_A_TIME = 1 << 24  # decoded for MaxSim


class VectorSearch:
    """Vectors of N images, in memory.

    One vector per image is searched by FAISS; its codes first choose candidates, see `RESCORED_PER_ANSWER`. Several
    are compared with the query one and all, by MaxSim.

    Args:
        codes: (N, W), or (N, R, W) for R vectors per image, as `codec` encodes them.
        codec: How they are stored.
    """

    def __init__(self, codes: np.ndarray, codec: VectorCodec):
        self.codec = codec
        # FAISS takes a copy; MaxSim reads all at each search, from memory rather than from a file.
        self.codes = codes if codes.ndim == 2 else np.require(codes, requirements="W")

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
            rows: (n,) The numbers of the images that are searched, by default all; some are compared one and all.

        Returns:
            Scores and numbers of the images, best first, both (top,). A score is the cosine, or the mean of the
            largest cosine of each vector of the query, with the vectors as they are decoded.
        """
        top = min(top, len(self) if rows is None else len(rows))
        if self.codes.ndim == 3 or rows is not None:
            scores = self._score_all(query, vectors, rows)
            best = torch.topk(scores, top)
            return best.values.numpy(), best.indices.numpy() if rows is None else rows[best.indices.numpy()]
        if self.codec.precision == "float32":
            scores, numbers = self._faiss_index.search(query[None], top)
            return scores[0], numbers[0]
        return self._search_codes(query, top)

    def _score_all(self, query: np.ndarray, vectors: int | None, rows: np.ndarray | None) -> torch.Tensor:
        """(N,) MaxSim of the query with each image, or (n,) with some."""
        codes = self.codes[:, :vectors] if self.codes.ndim == 3 else self.codes[:, None]  # (N, r, W)
        images = max(1, _VALUES_AT_A_TIME // (codes.shape[1] * self.codec.dimensions))
        # MaxSim is the mean of that of each vector of the query alone, of which one product has all.
        alone = torch.from_numpy(np.atleast_2d(query))[:, None]  # (Q, 1, D)
        parts = [torch.empty(0)]
        for start in range(0, len(codes) if rows is None else len(rows), images):
            part = slice(start, start + images)
            some = codes[part if rows is None else rows[part]]
            parts.append(maxsim(alone, torch.from_numpy(self.codec.decode(some))).mean(dim=0))
        return torch.cat(parts)

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
