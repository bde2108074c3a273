"""Figures for embeddings, captions and answers, given what is right: no model runs here."""

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from mmgem.late_interaction import similarity
from mmgem.training.evaluation.caption_words import caption_words

_MAX_SCORES = 2**24  # scores held at a time
_ARTICLES = {"a", "an", "the"}


def retrieval_ranks(
    queries: torch.Tensor, gallery: torch.Tensor, right: Sequence[Collection[int]], gallery_asks: bool = False
) -> torch.Tensor:
    """For each query, how many wrong gallery rows come before its best right one.

    A wrong row that scores the same as the right one counts as before it: embeddings that are all equal find nothing.

    Args:
        queries: (Q, D), or (Q, k, D) with several vectors of each.
        gallery: (G, D) or (G, m, D), likewise; the score is [`mmgem.late_interaction.similarity`].
        right: For each query the gallery rows that are right, at least one.
        gallery_asks: Whether the gallery is the side whose vectors MaxSim looks for, which it is where images look for
            texts: all models are trained with texts that ask, and not all with images that do.

    Returns:
        (Q,) int64, 0 is best.

    Raises:
        ValueError: If the sizes do not fit, a query has no right row, or one side has single vectors only.
    """
    _check_right(right, len(queries), len(gallery))
    ranks = []
    # A part of the queries at a time: all scores of 100,000 x 100,000 would be 40 GB.
    step = max(1, _MAX_SCORES // gallery[..., 0].numel())
    for start in range(0, len(queries), step):
        part = queries[start : start + step]
        scores = similarity(gallery, part).T if gallery_asks else similarity(part, gallery)  # (step, G)
        ranks.append(ranks_of_scores(scores, right[start : start + step]))
    return torch.cat(ranks)


def ranks_of_scores(scores: torch.Tensor, right: Sequence[Collection[int]]) -> torch.Tensor:
    """The ranks of `retrieval_ranks`, from the scores of all gallery rows.

    Args:
        scores: (Q, G).
        right: For each query the gallery rows that are right, at least one.

    Returns:
        (Q,) int64, 0 is best.

    Raises:
        ValueError: If the sizes do not fit, a query has no right row, or one that is not in the gallery.
    """
    _check_right(right, *scores.shape)
    is_right = torch.zeros_like(scores, dtype=torch.bool)  # (Q, G)
    for row, columns in enumerate(right):
        is_right[row, list(columns)] = True
    best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)  # (Q, 1)
    # `not <` rather than `>=`: a row of NaN is then as wrong as can be.
    return (~(scores < best) & ~is_right).sum(dim=1)


def _check_right(right: Sequence[Collection[int]], queries: int, gallery: int) -> None:
    if len(right) != queries:
        raise ValueError(f"`right` holds {len(right)} entries; expected {queries}, one for each of the queries.")
    for number, rows in enumerate(right):
        if not rows:
            raise ValueError(f"`right` is empty for query {number}; expected at least one gallery row.")
        if not 0 <= min(rows) <= max(rows) < gallery:
            raise ValueError(f"`right` is {sorted(rows)} for query {number}; expected rows from 0 to {gallery - 1}.")


@dataclass(frozen=True, eq=False)
class Mean:
    """A figure that is a mean, and how far it may be off.

    Args:
        values: (N,) what it is the mean of.
        images: (N,) numbers of the images that they are of, which are drawn anew; by default each has its own.
    """

    values: torch.Tensor
    images: torch.Tensor | None = None

    def __float__(self) -> float:
        return self.values.double().mean().item()

    def interval(self, level: float = 0.95, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Return a confidence interval by bootstrap: images are drawn with replacement, each with all its values.

        Args:
            level: How often such an interval holds the mean.
            samples: How often images are drawn.
            seed: Decides all draws.
        """
        values = self.values.double()
        if self.images is None:
            sums, counts = values, torch.ones_like(values)
        else:
            numbers = self.images.unique(return_inverse=True)[1]  # (N,)
            sums = torch.zeros(int(numbers.max()) + 1, dtype=values.dtype).index_add(0, numbers, values)  # (I,)
            counts = torch.zeros_like(sums).index_add(0, numbers, torch.ones_like(values))  # (I,)
        generator = torch.Generator().manual_seed(seed)
        means = []
        step = max(1, _MAX_SCORES // len(sums))
        for start in range(0, samples, step):
            drawn = torch.randint(len(sums), (min(step, samples - start), len(sums)), generator=generator)
            means.append(sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1))
        low, high = torch.cat(means).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype))
        return low.item(), high.item()


def recall_at(ranks: torch.Tensor, k: int) -> float:
    """The share of queries with a right row among their first `k`, from the ranks of `retrieval_ranks`."""
    return (ranks < k).double().mean().item()


def pointing_hits(points: torch.Tensor, boxes: Sequence[Sequence[Sequence[float]]]) -> torch.Tensor:
    """The pointing game (Zhang et al., 2016, https://arxiv.org/abs/1608.00507): whether a point lies in a box of what
    it points at.

    Args:
        points: (N, 2) x, y, in pixels.
        boxes: For each point the boxes `[x0, y0, x1, y1]` that are right, edges included.

    Returns:
        (N,) bool.
    """
    return torch.tensor(
        [
            any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in own)
            for (x, y), own in zip(points.tolist(), boxes, strict=True)
        ]
    )


class BudgetRecall(NamedTuple):
    """Recall@1 where so many vectors of so many dimensions are kept.

    Args:
        query_vectors, document_vectors: How many of each query and each document; 1 for single vectors.
        dimensions: Values of each vector.
        bytes_per_document: Bytes of its vectors, as the gallery holds them.
        recall: Recall@1, 0 to 1.
    """

    query_vectors: int
    document_vectors: int
    dimensions: int
    bytes_per_document: int
    recall: float


def recall_by_budget(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    right: Sequence[Collection[int]],
    vectors: Sequence[tuple[int, int]] | None = None,
    dimensions: Sequence[int] | None = None,
) -> list[BudgetRecall]:
    """Recall@1 at every budget, from embeddings that are computed once.

    A budget keeps the first vectors of an embedding (nested groups, MetaEmbed, arXiv:2509.18095) and the first
    dimensions of a vector (Matryoshka, arXiv:2205.13147), which is made a unit vector again.

    Args:
        queries, gallery, right: As for `retrieval_ranks`.
        vectors: Numbers of vectors to keep, of a query and of a document; by default all of them.
        dimensions: Numbers of dimensions to keep, each with each of `vectors`; by default all of them.

    Raises:
        ValueError: As `retrieval_ranks`; or if a budget asks for more than there is, or for less than one.
    """
    query_count, document_count = (embeds.shape[1] if embeds.ndim == 3 else 1 for embeds in (queries, gallery))
    width = gallery.shape[-1]
    vectors = [(query_count, document_count)] if vectors is None else list(vectors)
    dimensions = [width] if dimensions is None else list(dimensions)
    for r, m in vectors:
        if not (1 <= r <= query_count and 1 <= m <= document_count):
            raise ValueError(f"`vectors` holds {(r, m)}; expected (1, 1) to ({query_count}, {document_count}).")
    if outside := [d for d in dimensions if not 1 <= d <= width]:
        raise ValueError(f"`dimensions` holds {outside[0]}; expected numbers from 1 to {width}.")

    budgets = []
    for r, m in vectors:
        for d in dimensions:
            kept_queries, kept_gallery = _kept(queries, r, d), _kept(gallery, m, d)
            recall = recall_at(retrieval_ranks(kept_queries, kept_gallery, right), 1)
            budgets.append(BudgetRecall(r, m, d, m * d * gallery.element_size(), recall))
    return budgets


def _kept(embeds: torch.Tensor, vectors: int, dimensions: int) -> torch.Tensor:
    """(N, D) -> (N, dimensions), or (N, k, D) -> (N, vectors, dimensions); unit vectors."""
    kept = embeds[:, :vectors] if embeds.ndim == 3 else embeds
    return normalize(kept[..., :dimensions], dim=-1)


def agreement(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """The share of predictions that equal their reference."""
    return sum(a == b for a, b in zip(predictions, references, strict=True)) / len(references)


@dataclass(frozen=True)
class CaptionJudge:
    """A judge of the captions of one kind of pictures, which are right or wrong in whatever words.

    Args:
        parse_caption: Caption to its meaning, equal for captions that say the same; None for a text that is no caption
            of these pictures, which is then not judged.
        parse_region_caption: Likewise for a caption of a region.
        classes: All classes that the pictures can have.
        label_prompt: Class to the text that searches for it.
    """

    parse_caption: Callable[[str], Hashable | None]
    parse_region_caption: Callable[[str], Hashable | None]
    classes: Sequence[str]
    label_prompt: Callable[[str], str]

    def fits(self, captions: Sequence[str], region_captions: Sequence[str]) -> bool:
        """Whether it is a judge of these pictures: one that can read most of their reference captions.

        A phrase such as "a red ball" can be read in photographs as well, and would be judged among nothing else.

        Args:
            captions: Reference captions of images.
            region_captions: Reference captions of regions.
        """
        meanings = [*map(self.parse_caption, captions), *map(self.parse_region_caption, region_captions)]
        return 2 * sum(meaning is not None for meaning in meanings) >= len(meanings)

    def caption_fidelity(self, captions: Sequence[str], references: Sequence[str]) -> float | None:
        """The share of captions that say exactly what their reference says.

        Returns:
            0 to 1 over the references that can be judged, or None where none can.
        """
        return _fidelity(captions, references, self.parse_caption)

    def region_caption_fidelity(self, captions: Sequence[str], references: Sequence[str]) -> float | None:
        """As `caption_fidelity`, for captions of regions."""
        return _fidelity(captions, references, self.parse_region_caption)


def right_answers(answers: Sequence[str], references: Sequence[str]) -> torch.Tensor:
    """(N,) bool, whether each answer is its reference, but for case, punctuation and articles."""
    pairs = zip(answers, references, strict=True)
    return torch.tensor([_content(answer) == _content(reference) for answer, reference in pairs])


def answer_accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are right, by `right_answers`."""
    return float(Mean(right_answers(answers, references)))


def prior_accuracy(questions: Sequence[str], references: Sequence[str]) -> float:
    """The `answer_accuracy` of one who sees no image, but knows the most frequent answer to each type of question.

    Args:
        questions: Those with the same first two words are of a type.
        references: The right answer to each.
    """
    types = [" ".join(question.lower().split()[:2]) for question in questions]
    counts: dict[str, Counter] = defaultdict(Counter)
    for kind, reference in zip(types, references, strict=True):
        counts[kind][_content(reference)] += 1
    return sum(max(own.values()) for own in counts.values()) / len(types)


def _content(answer: str) -> tuple[str, ...]:
    words = tuple(_words(answer).split())
    # Nothing but an article is an answer too: "a" to "which letter is it?"
    return tuple(word for word in words if word not in _ARTICLES) or words


def _fidelity(captions, references, parse) -> float | None:
    meanings = [(parse(caption), parse(reference)) for caption, reference in zip(captions, references, strict=True)]
    judged = [pair for pair in meanings if pair[1] is not None]
    return agreement(*zip(*judged, strict=True)) if judged else None


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> "Mean":
    """CIDEr-D (Vedantam et al., 2015, arXiv:1411.5726) over the words of `caption_words`.

    Args:
        captions: One caption for each image.
        references: The reference captions of each image.

    Returns:
        The mean over images, 0 to 10; papers print it times 100. It depends on the whole set: a word weighs by how few
        images have it in their references.

    Raises:
        ValueError: If there are fewer than two images: every word is then in all of them, and weighs nothing.
        ImportError: If pycocoevalcap is not installed (the extra `eval`).
    """
    candidates, originals = _as_coco(captions, references)
    if len(captions) < 2:
        raise ValueError(
            f"`captions` is of {len(captions)} images; expected 2 or more, because CIDEr weighs words by image."
        )
    from pycocoevalcap.cider.cider import Cider

    return Mean(torch.from_numpy(Cider().compute_score(originals, candidates)[1]))


def bleu4(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 (Papineni et al., 2002, https://aclanthology.org/P02-1040) over the words of `caption_words`.

    Args:
        captions: One caption for each image.
        references: The reference captions of each image.

    Returns:
        That of all captions together, 0 to 1.

    Raises:
        ImportError: If pycocoevalcap is not installed (the extra `eval`).
    """
    candidates, originals = _as_coco(captions, references)
    from pycocoevalcap.bleu.bleu import Bleu

    return float(Bleu(4).compute_score(originals, candidates, verbose=0)[0][3])


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 (Denkowski and Lavie, 2014, https://aclanthology.org/W14-3348) of English captions.

    Args:
        captions: One caption for each image.
        references: The reference captions of each image.

    Returns:
        That of all captions together, 0 to 1.

    Raises:
        FileNotFoundError: If there is no Java, in which METEOR is written.
        ImportError: If pycocoevalcap is not installed (the extra `eval`).
    """
    candidates, originals = _as_coco(captions, references)
    if shutil.which("java") is None:
        raise FileNotFoundError("`java` is not installed; expected it for METEOR, which is written in Java.")
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(originals, candidates)[0])


def caption_variety(captions: Sequence[str]) -> dict[str, float]:
    """Say how much captions differ.

    Args:
        captions: One caption for each image.

    Returns:
        `caption_distinct`, the share of different captions; `caption_most_repeated`, the share of images with the most
        frequent caption; `caption_length`, the mean number of words.
    """
    words = [caption_words(caption) for caption in captions]
    counts = Counter(words)
    return {
        "caption_distinct": len(counts) / len(words),
        "caption_most_repeated": max(counts.values()) / len(words),
        "caption_length": sum(len(own.split()) for own in words) / len(words),
    }


def _as_coco(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Captions and references as pycocoevalcap takes them."""
    if len(captions) != len(references):
        raise ValueError(
            f"`references` holds {len(references)} entries; expected {len(captions)}, one for each of the captions."
        )
    candidates = {number: [caption_words(caption)] for number, caption in enumerate(captions)}
    return candidates, {number: [caption_words(text) for text in own] for number, own in enumerate(references)}


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
