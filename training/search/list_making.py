"""The lists of an index are made, and the effort of a search is settled by the recall that it reaches."""

from collections.abc import Mapping

import numpy as np
from tqdm.auto import tqdm

from mmgem.training.inference import embed_texts
from mmgem.training.search.inverted_lists import InvertedLists, is_large
from mmgem.training.search.items import WHOLE_IMAGES
from mmgem.training.search.storage import IndexFacts, IndexRows
from mmgem.training.search.vector_search import VectorSearch

RECALL, TOP = 0.98, 10  # the recall@10 that is aimed for
QUERIES = 200  # of each kind
_LEAST_EFFORT = 4
_ROUNDING = 1e-5


class _DecodedRows:
    """The vectors of rows, (N, R, D), of which `vectors[rows]` are read."""

    def __init__(self, rows: IndexRows, facts: IndexFacts):
        self._codes, self._codec = rows.arrays["embedding"], facts.codec

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, rows) -> np.ndarray:
        vectors = self._codec.decode(self._codes[rows])
        return vectors if vectors.ndim == 3 else vectors[:, None]


def make_lists(
    rows: IndexRows,
    facts: IndexFacts,
    model,
    processor,
    earlier: InvertedLists | None = None,
    earlier_rows: np.ndarray | None = None,
) -> InvertedLists | None:
    """Puts the vectors of an index into lists, if there are enough.

    Two kinds of queries are then asked, to find how many lists a search has to look into: rows of the index, each of
    which has to find the others that are nearest to it; and captions of its images, or if it has none, what lies
    halfway between two rows, which is as far from all as a text is, or farther.

    Args:
        rows: The rows.
        facts: What is known of them.
        model: The `MMGEMModel` that embedded them.
        processor: Its `MMGEMProcessor`.
        earlier, earlier_rows: As for `InvertedLists.build`.

    Returns:
        The lists; None for an index that is searched as well without.
    """
    vectors = _DecodedRows(rows, facts)
    if not is_large(len(vectors), facts.settings.vectors):
        return None
    lists = InvertedLists.build(vectors, 4 if facts.codec.precision == "binary" else 8, earlier, earlier_rows)
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.choice(len(vectors), min(QUERIES, len(vectors)), replace=False))
    own = vectors[chosen]  # (B, R, D)
    queries = {"rows": own}
    if captions := _captions(rows, generator) if "text" in model.config.embedded_kinds else []:
        embeds = facts.settings.shorten(embed_texts(model, processor, captions)).numpy()
        queries["captions"] = embeds if embeds.ndim == 3 else embeds[:, None]
    else:
        between = own + own[generator.permutation(len(own))]
        queries["between"] = between / np.linalg.norm(between, axis=-1, keepdims=True).clip(1e-6)
    settle_effort(lists, VectorSearch(rows.arrays["embedding"], facts.codec, lists), queries, {"rows": chosen})
    return lists


def settle_effort(
    lists: InvertedLists, search: VectorSearch, queries: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]
) -> None:
    """Finds the least effort, of 4, 8, 16 ... lists, at which all kinds of queries reach the recall that is aimed for.

    Args:
        lists: Receives the effort and its recall.
        search: Among the vectors that are in the lists.
        queries: (B, Q, D) of each kind.
        own: (B,) Of a kind whose queries are rows of the index, their numbers: what else they find counts.
    """
    expected = {kind: _of_others(*search.compare(some, TOP + 1), own.get(kind)) for kind, some in queries.items()}
    lists.effort = min(_LEAST_EFFORT, lists.index.nlist)
    with tqdm(desc="effort", unit="try") as progress:
        while True:
            for kind, some in queries.items():
                scores, rows = zip(*(search.search(query, TOP + 1) for query in some), strict=True)
                found = _of_others(np.stack(scores), np.stack(rows), own.get(kind))
                # What scores as much is as good: pictures may be there twice.
                lists.recall[kind] = float((found >= expected[kind][:, -1:] - _ROUNDING).mean())
            progress.update()
            if min(lists.recall.values()) >= RECALL or lists.effort == lists.index.nlist:
                return
            lists.effort = min(2 * lists.effort, lists.index.nlist)


def _captions(rows: IndexRows, generator: np.random.Generator) -> list[str]:
    """One caption each of some images."""
    texts = rows.table["text"]
    are_images = np.isin(rows.table["kind"].to_numpy(), WHOLE_IMAGES) & (texts.to_numpy() != "")
    chosen = generator.permutation(np.flatnonzero(are_images))[:QUERIES]
    return [texts[int(row)].as_py().splitlines()[0] for row in np.sort(chosen)]


def _of_others(scores: np.ndarray, rows: np.ndarray, own: np.ndarray | None) -> np.ndarray:
    """(B, TOP) The first scores that are not of the query itself."""
    is_other = np.ones(rows.shape, bool) if own is None else rows != own[:, None]
    return np.stack([some[others][:TOP] for some, others in zip(scores, is_other, strict=True)])
