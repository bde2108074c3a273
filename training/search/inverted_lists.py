"""An approximate index of the vectors of many rows: inverted lists of FAISS, which choose candidates for a search."""

from collections.abc import Mapping
from math import ceil
from typing import Any, cast

import faiss
import numpy as np

# From this many vectors on an index has lists; below it a search compares all.
EXACT_BELOW = 100_000
COMPARED_ALL = 1000  # rows, at most, of a search among some of them, that are compared one and all
CANDIDATES_PER_ANSWER, CANDIDATES = 10, 100  # vectors, for each answer, and at least
_TRAINED_ON, _ITERATIONS = 64, 10  # vectors for each list
_VALUES_AT_A_TIME = 1 << 24


def is_large(rows: int, vectors: int | None) -> bool:
    """Whether rows of this many vectors each, None for one, are enough for lists."""
    return rows * (vectors or 1) >= EXACT_BELOW


class InvertedLists:
    """Vectors in lists, each around a center, of which a search looks into the nearest ones (IVF, by FAISS).

    A vector takes a byte for each value (half of one where the values are bits), and 8 for its number: they choose
    candidates, and the vectors as they are stored decide.

    Args:
        index: The lists. A row of R vectors has the numbers from `R * row` on.
        vectors: The number R of vectors of a row.
        effort: Lists that a search looks into.
        recall: The recall@10 that this reaches against a comparison with all vectors, by kind of query.
    """

    def __init__(
        self, index: faiss.IndexIVF, vectors: int, effort: int = 1, recall: Mapping[str, float] | None = None
    ):
        self.index, self.vectors, self.effort, self.recall = index, vectors, effort, dict(recall or {})

    @classmethod
    def build(
        cls, vectors, bits: int = 8, earlier: "InvertedLists | None" = None, earlier_rows: np.ndarray | None = None
    ) -> "InvertedLists":
        """Puts vectors into lists.

        Args:
            vectors: `len(vectors)` is the number N of rows, and `vectors[rows]` gives those of a slice or of sorted
                numbers, (n, R, D) float32 of unit length.
            bits: Of a value, 8 or 4.
            earlier: The lists of an earlier state of the rows. Where their number still suits, no centers are sought
                again, and a row that was there stays in its lists.
            earlier_rows: (N,) The number that each row had then; -1 for new ones.
        """
        rows = len(vectors)
        _, per_row, dimensions = vectors[:1].shape
        lists = _count_lists(rows * per_row)
        cells = np.full((rows, per_row), -1, np.int64)
        index: Any
        if earlier is not None and earlier.index.nlist == lists:
            index = faiss.clone_index(earlier.index)
            if earlier_rows is not None:
                known = earlier_rows >= 0
                cells[known] = earlier.cells()[earlier_rows[known]]
            index.reset()
        else:
            kind = faiss.ScalarQuantizer.QT_8bit if bits == 8 else faiss.ScalarQuantizer.QT_4bit
            quantizer = faiss.IndexFlatIP(dimensions)
            index = faiss.IndexIVFScalarQuantizer(quantizer, dimensions, lists, kind, faiss.METRIC_INNER_PRODUCT)
            index.cp.niter = _ITERATIONS
            count = min(rows, -(-_TRAINED_ON * lists // per_row))
            chosen = np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
            index.train(vectors[chosen].reshape(-1, dimensions))
        step = max(1, _VALUES_AT_A_TIME // (per_row * dimensions))
        for part in (slice(start, start + step) for start in range(0, rows, step)):
            own = np.ascontiguousarray(vectors[part].reshape(-1, dimensions))  # (n * R, D)
            cell = cells[part].reshape(-1)
            if (is_new := cell < 0).any():
                cell[is_new] = index.quantizer.search(own[is_new], 1)[1][:, 0]
            index.add_core(len(own), faiss.swig_ptr(own), None, faiss.swig_ptr(cell))
        return cls(index, per_row)

    @classmethod
    def from_bytes(cls, data: memoryview, vectors: int, effort: int, recall: Mapping[str, float]) -> "InvertedLists":
        """Reads what `to_bytes` gave, which has to be known to be just that; arguments are those of the class."""
        index: Any = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        return cls(index, vectors, effort, recall)

    def to_bytes(self) -> np.ndarray:
        """Returns the lists as bytes."""
        return faiss.serialize_index(self.index)

    def cells(self) -> np.ndarray:
        """(N, R) The list that each vector is in."""
        cells = np.empty(self.index.ntotal, np.int64)
        lists: Any = self.index.invlists
        for number in range(self.index.nlist):
            if size := lists.list_size(number):
                cells[faiss.rev_swig_ptr(lists.get_ids(number), size)] = number
        return cells.reshape(-1, self.vectors)

    def candidates(
        self, query: np.ndarray, top: int, vectors: int | None = None, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows that may be among the nearest to a query.

        Args:
            query: (D,), or (Q, D) for several vectors; float32, of unit length.
            top: The number of answers that are wanted. There are that many rows at least, as far as there are any.
            vectors: How many of the first of the R vectors count; by default all.
            rows: (n,) The numbers of the rows that are searched; by default all.

        Returns:
            (m,) Their numbers, sorted.
        """
        count = max(CANDIDATES, CANDIDATES_PER_ANSWER * top)
        top = min(top, self.index.ntotal // self.vectors if rows is None else len(rows))
        selector, library = None, cast(Any, faiss)  # whose annotations are those of its C++ constructors
        if rows is not None or (vectors or self.vectors) < self.vectors:
            is_selected = np.zeros((self.index.ntotal // self.vectors, self.vectors), bool)
            is_selected[slice(None) if rows is None else rows, :vectors] = True
            selector = library.IDSelectorBitmap(np.packbits(is_selected.reshape(-1), bitorder="little"))
        # Among fewer rows as many vectors are compared: those of more lists.
        share = 1.0 if rows is None else len(rows) * self.vectors / self.index.ntotal
        effort = min(self.index.nlist, ceil(self.effort / share))
        while True:
            parameters = library.SearchParametersIVF(nprobe=effort, sel=selector)
            numbers = self.index.search(np.atleast_2d(query), count, params=parameters)[1]
            found = np.unique(numbers[numbers >= 0] // self.vectors)
            if len(found) >= top:
                return found
            # The lists have too few that are selected, or the nearest vectors are of too few rows.
            effort, count = min(4 * effort, self.index.nlist), min(4 * count, self.index.ntotal)


def _count_lists(vectors: int) -> int:
    """A power of 2, about twice the root: a search compares as many centers as it then compares vectors of a list."""
    return 1 << max(0, round(np.log2(2 * vectors**0.5)))
