"""Metrics of this package as `evaluate.Metric`s, which need no network: `CIDErD().compute(predictions=…, …)`.

The arithmetic is that of `metrics`, with which `evaluate_model` measures.
"""

from collections.abc import Sequence

import evaluate
import torch
from datasets import Features, List, Value

from mmgem.training.evaluation.metrics import (
    answer_accuracy,
    bleu4,
    caption_variety,
    cider,
    meteor,
    ranks_of_scores,
    recall_at,
)


class _InMemory(evaluate.Metric):
    """Predictions stay in memory, where no other process can meet them, unless several processes share a metric."""

    def __init__(self, config_name: str | None = None, keep_in_memory: bool | None = None, **kwargs):
        if keep_in_memory is None:
            keep_in_memory = kwargs.get("num_process", 1) == 1
        super().__init__(config_name, keep_in_memory, **kwargs)


class RecallAtK(_InMemory):
    """Recall@k of a retrieval in which a query may have several right answers."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of queries with a right answer among their k best; ties with a wrong one do not count.",
            citation="",
            inputs_description="""
            Args:
                predictions: For each query its score with every item of a gallery; galleries may differ.
                references: For each query the numbers of the items that are right, at least one.
                k: One cut-off or several, by default (1, 5, 10).

            Returns:
                `recall@k`, 0 to 1, for each k.
            """,
            features=Features(predictions=List(Value("float64")), references=List(Value("int64"))),
        )

    def _compute(
        self, predictions: Sequence[Sequence[float]], references: Sequence[Sequence[int]], k: int | Sequence[int] = ()
    ) -> dict[str, float]:
        cut_offs = [k] if isinstance(k, int) else k or (1, 5, 10)
        rows = zip(predictions, references, strict=True)
        ranks = torch.cat([ranks_of_scores(torch.tensor([scores]), [right]) for scores, right in rows])
        return {f"recall@{cut_off}": recall_at(ranks, cut_off) for cut_off in cut_offs}


def _about_captions(
    description: str, citation: str, returns: str, predictions: str = "One caption for each image."
) -> evaluate.MetricInfo:
    """Of a metric that compares captions with the reference captions of their images."""
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=f"""
        Args:
            predictions: {predictions}
            references: For each image its reference captions.

        Returns:
            {returns}
        """,
        features=Features(predictions=Value("string"), references=List(Value("string"))),
    )


class CIDErD(_InMemory):
    """CIDEr-D of captions, which needs pycocoevalcap."""

    def _info(self):
        return _about_captions(
            "CIDEr-D over the words that the COCO evaluation cuts captions into.",
            "Vedantam et al., CIDEr: Consensus-based Image Description Evaluation, 2015, arXiv:1411.5726",
            returns="`cider`, 0 to 10; papers print it times 100.",
            predictions="One caption for each image, of two images or more.",
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"cider": float(cider(predictions, references))}


class BLEU4(_InMemory):
    """BLEU-4 of captions, which needs pycocoevalcap."""

    def _info(self):
        return _about_captions(
            "BLEU-4 over the words that the COCO evaluation cuts captions into.",
            "Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation, ACL 2002",
            returns="`bleu4`, 0 to 1.",
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"bleu4": bleu4(predictions, references)}


class METEOR(_InMemory):
    """METEOR of captions, which needs pycocoevalcap and Java."""

    def _info(self):
        return _about_captions(
            "METEOR 1.5 of English captions, with stems, synonyms and paraphrases.",
            "Denkowski and Lavie, Meteor Universal: Language Specific Translation Evaluation, WMT 2014",
            returns="`meteor`, 0 to 1.",
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return {"meteor": meteor(predictions, references)}


class CaptionVariety(_InMemory):
    """How much captions differ."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of different captions, share of the most frequent one, and length of captions.",
            citation="",
            inputs_description="""
            Args:
                predictions: One caption for each image.

            Returns:
                `caption_distinct` and `caption_most_repeated`, 0 to 1, and `caption_length` in words.
            """,
            features=Features(predictions=Value("string")),
        )

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        return caption_variety(predictions)


class AnswerAccuracy(_InMemory):
    """Share of short answers that are right."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of answers that are their reference, but for case, punctuation and articles.",
            citation="",
            inputs_description="""
            Args:
                predictions: Answers.
                references: The right answer to each question.

            Returns:
                `answer_accuracy`, 0 to 1.
            """,
            features=Features(predictions=Value("string"), references=Value("string")),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"answer_accuracy": answer_accuracy(predictions, references)}
