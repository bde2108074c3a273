"""Hybrid search: the words of a query beside its vector, and one ranking of both."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

_WORD = r"(?u)[^\W_]+"  # letters and digits; names of files are often words joined by underscores
RANKED = 1000  # answers of each kind of search, which a hybrid one ranks
_RANK_CONSTANT = 60  # of reciprocal rank fusion, as in its paper
_WEIGHTS = np.linspace(0, 1, 21)  # that are tried


class LexicalSearch:
    """BM25 over the words of texts, by `bm25s` (https://arxiv.org/abs/2407.03618).

    Args:
        texts: N texts.
    """

    def __init__(self, texts: Sequence[str]):
        import bm25s  # with scipy, and only where words are searched

        self._size, self._tokenize = len(texts), bm25s.tokenize
        tokens = bm25s.tokenize(list(texts), token_pattern=_WORD, stopwords=None, show_progress=False)
        self._index = None
        if tokens.vocab.keys() - {""}:
            self._index = bm25s.BM25()
            self._index.index(tokens, show_progress=False)

    def rank(self, query: str, top: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Ranks the texts that have a word of a query.

        Args:
            query: The query.
            top: The most that are ranked.
            rows: (n,) The numbers of the texts that are searched; by default all.

        Returns:
            Their numbers, best first; of equal scores the first in order.
        """
        [words] = self._tokenize([query], token_pattern=_WORD, stopwords=None, show_progress=False, return_ids=False)
        if self._index is None or not words:
            return np.empty(0, np.int64)
        scores = self._index.get_scores(words)  # (N,)
        rows = np.arange(self._size) if rows is None else rows
        rows = rows[scores[rows] > 0]
        return rows[np.argsort(-scores[rows], kind="stable")[:top]]


def fuse_ranks(rankings: Sequence[np.ndarray], weights: Sequence[float], top: int) -> tuple[np.ndarray, np.ndarray]:
    """Weighted reciprocal rank fusion (Cormack et al., 2009): of scores that have no common scale, ranks have one.

    Args:
        rankings: For each, numbers, best first; a number that is missing gains nothing by it.
        weights: Of each ranking; they sum to 1.
        top: The number of answers.

    Returns:
        Scores and numbers, best first, both (top,) at most; of equal scores those of an earlier ranking first. A score
        is the sum of weight * 61 / (60 + rank), so that it is 1 where all rankings have the same first.
    """
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, number in enumerate(ranking.tolist(), start=1):
            gain = weight * (_RANK_CONSTANT + 1) / (_RANK_CONSTANT + rank)
            scores[number] = scores.get(number, 0.0) + gain
    best = sorted(((number, score) for number, score in scores.items() if score > 0), key=lambda one: -one[1])[:top]
    return np.array([score for _, score in best]), np.array([number for number, _ in best], np.int64)


class LabelledQuery(NamedTuple):
    """A query and what it should find.

    Args:
        text: The query.
        relevant: Names of files as in the index.
    """

    text: str
    relevant: Collection[str]


class FittedWeight(NamedTuple):
    """Result of `fit_lexical_weight`.

    Args:
        lexical_weight: The weight, 0 to 1.
        reciprocal_rank: What it reaches: the mean over the queries of 1 / the rank of the first relevant file.
        dense, lexical: The same of each ranking alone.
    """

    lexical_weight: float
    reciprocal_rank: float
    dense: float
    lexical: float


def fit_lexical_weight(index, queries: Sequence[LabelledQuery], **limits) -> FittedWeight:
    """Finds the weight of words by which labelled queries find the most, of 0, 0.05 ... 1.

    Args:
        index: A `SearchIndex`.
        queries: The queries; as they are fitted to, others are needed to say what the weight is worth.
        limits: `prompt`, `kinds`, `where` ..., as for `SearchIndex.search`.

    Returns:
        The weight; of equally good ones that next to 0.5.

    Raises:
        ValueError: If there are no queries, or for a file that is not in the index.
    """
    if not queries:
        raise ValueError("`queries` is empty; expected at least one.")
    names = np.array(index.rows["file_name"])
    known = {*names.tolist()}
    ranks = np.zeros((len(_WEIGHTS), len(queries)))
    for number, query in enumerate(queries):
        missing = sorted({*query.relevant} - known)
        if missing or not query.relevant:
            raise ValueError(
                f"`queries` holds {query.text!r} with the relevant files {missing!r:.200}; expected some of the index."
            )
        rankings = [
            np.array([hit.row for hit in index.search(query.text, top=RANKED, lexical_weight=weight, **limits)], int)
            for weight in (1.0, 0.0)
        ]
        is_relevant = np.isin(names, list(query.relevant))
        for row, weight in enumerate(_WEIGHTS):
            _, found = fuse_ranks(rankings, (weight, 1 - weight), len(names))
            places = np.flatnonzero(is_relevant[found])
            ranks[row, number] = 1 / (1 + places[0]) if len(places) else 0
    means = ranks.mean(axis=1)
    best = max(range(len(_WEIGHTS)), key=lambda row: (round(means[row], 9), -abs(_WEIGHTS[row] - 0.5)))
    return FittedWeight(float(_WEIGHTS[best]), float(means[best]), float(means[0]), float(means[-1]))
