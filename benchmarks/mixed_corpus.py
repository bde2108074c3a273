"""Search in a corpus of images, texts and both: what the gap between modalities costs there."""

from collections.abc import Hashable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from mmgem.late_interaction import similarity
from mmgem.modality_calibrator import ModalityCalibrator
from mmgem.training.data.rows import captions_of, check_row, images_of, row_name
from mmgem.training.evaluation.calibration import modality_gap
from mmgem.training.evaluation.metrics import recall_at, retrieval_ranks
from mmgem.training.inference import embed_fused, embed_images, embed_texts
from mmgem.training.scenes.caption_parser import parse_caption

CUTOFF = 10  # hits that are looked at


class MixedCorpus(NamedTuple):
    """Embeddings (N, D) or (N, k, D) of a mixed corpus and of what is searched for in it, unit vectors.

    Args:
        queries: Of Q texts.
        documents: For each modality those of Q documents, of which the q-th is right for query q.
        distractors: Of texts in the corpus that are wrong for all queries, if there are any.
    """

    queries: torch.Tensor
    documents: dict[str, torch.Tensor]
    distractors: torch.Tensor | None = None

    def calibrated(self, calibrator: ModalityCalibrator) -> "MixedCorpus":
        """What a model with this calibrator gives instead of these embeddings."""
        return MixedCorpus(
            calibrator(self.queries, "text"),
            {modality: calibrator(embeds, modality) for modality, embeds in self.documents.items()},
            None if self.distractors is None else calibrator(self.distractors, "text"),
        )


def evaluate_mixed_corpus(
    model, processor, rows: Iterable[Mapping[str, Any]], batch_size: int = 64
) -> dict[str, float]:
    """Measures text search in a mixed corpus, with the model's calibrator where it has one.

    Every row is in the corpus three times: as its image, as its second caption, and as its image with its third
    caption. Its first caption is the query, for which these three are right and all others are wrong. Wrong for every
    query are the rows' `hard_negatives`, but for those that are true of another row. A model with a gap between its
    modalities finds false captions before the right image (MixBench, arXiv:2507.19054).

    | metric | what it is |
    |---|---|
    | `ndcg@10` | 1 where the three right documents come first; equal scores count as their mean over all orders |
    | `image_recall@10` | the share of queries with the right image among the first 10 documents |
    | `text_recall@10`, `fused_recall@10` | likewise the right caption, and the right image with caption |
    | `modality_gap` | distance between the means of two kinds of documents, the largest; 0 is best, 2 is most |

    Args:
        model: An `MMGEMModel`, on any device.
        processor: Its `MMGEMProcessor`.
        rows: With an image and three different captions each, which are true of no other row, such as
            `SceneDataset(..., unique=True)`; with or without `hard_negatives`, captions that are false.
        batch_size: Rows at a time.

    Returns:
        Metric name to value.

    Raises:
        ValueError: If there are fewer than `CUTOFF` rows, or a row lacks an image or three different captions.
        ImportError: If scikit-learn, which comes with sentence-transformers, is not installed
            (the extra `train`).
    """
    return mixed_corpus_figures(embed_mixed_corpus(model, processor, rows, batch_size))


def embed_mixed_corpus(model, processor, rows: Iterable[Mapping[str, Any]], batch_size: int = 64) -> MixedCorpus:
    """The queries and documents of `evaluate_mixed_corpus`; arguments and errors are the same."""
    queries: list[torch.Tensor] = []
    documents: dict[str, list[torch.Tensor]] = {modality: [] for modality in ("image", "text", "fused")}
    false: list[str] = []
    meanings: set[Hashable] = set()
    remaining = enumerate(tqdm(rows, desc="corpus", unit="row", leave=False))
    while batch := list(islice(remaining, batch_size)):
        images, captions = zip(*(_documents_of(row, row_name(row, number)) for number, row in batch), strict=True)
        asked, told, joined = zip(*captions, strict=True)
        queries.append(embed_texts(model, processor, asked))
        documents["image"].append(embed_images(model, processor, images))
        documents["text"].append(embed_texts(model, processor, told))
        documents["fused"].append(embed_fused(model, processor, images, joined))
        false += [text for _, row in batch for text in row.get("hard_negatives") or []]
        meanings |= {_meaning(caption) for caption in asked}
    if not queries:
        raise ValueError(f"`rows` is empty; expected {CUTOFF} or more.")
    false = [text for text in false if _meaning(text) not in meanings]
    return MixedCorpus(
        torch.cat(queries),
        {modality: torch.cat(embeds) for modality, embeds in documents.items()},
        embed_texts(model, processor, false) if false else None,
    )


def mixed_corpus_figures(corpus: MixedCorpus) -> dict[str, float]:
    """The metrics of `evaluate_mixed_corpus`, from embeddings.

    Raises:
        ValueError: If there are fewer than `CUTOFF` queries, or not as many documents of a modality as queries.
    """
    from sklearn.metrics import ndcg_score

    queries, documents, distractors = corpus
    count = len(queries)
    if count < CUTOFF:
        raise ValueError(f"`queries` has {count} rows; expected {CUTOFF} or more.")
    if uneven := {modality: len(embeds) for modality, embeds in documents.items() if len(embeds) != count}:
        raise ValueError(f"`documents` has {uneven} rows by modality; expected {count} of each, as many as queries.")
    gallery = torch.cat([*documents.values(), *([] if distractors is None else [distractors])])
    is_right = torch.zeros(count, len(gallery))
    figures: dict[str, float] = {}
    for number, modality in enumerate(documents):
        right = range(number * count, (number + 1) * count)
        is_right[range(count), right] = 1
        ranks = retrieval_ranks(queries, gallery, [{document} for document in right])
        figures[f"{modality}_recall@{CUTOFF}"] = recall_at(ranks, CUTOFF)
    ndcg = ndcg_score(is_right.numpy(), similarity(queries, gallery).numpy(), k=CUTOFF)
    return {f"ndcg@{CUTOFF}": float(ndcg)} | figures | {"modality_gap": modality_gap(documents)}


def _meaning(caption: str) -> Hashable:
    """What a caption of a scene says in whatever words; of others the words."""
    return parse_caption(caption) or caption.lower()


def _documents_of(row: Mapping[str, Any], name: str) -> tuple[Any, list[str]]:
    """The image of a row and three captions."""
    check_row(row, name)
    images, captions = images_of(row), list(dict.fromkeys(captions_of(row)))
    if len(images) != 1 or len(captions) < 3:
        raise ValueError(
            f"{name} has {len(images)} images and {len(captions)} different captions; expected 1 and 3 or more"
        )
    return images[0], captions[:3]
