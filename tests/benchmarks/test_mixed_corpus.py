import math

import pytest
import torch
from tiny_models import build_model
from torch.nn.functional import normalize, one_hot

from benchmarks.mixed_corpus import MixedCorpus, embed_mixed_corpus, evaluate_mixed_corpus, mixed_corpus_figures
from mmgem.training.evaluation.calibration import calibrate, modality_gap
from mmgem.training.inference import embed_fused, embed_images, embed_texts, uncalibrated
from mmgem.training.scenes.dataset import SceneDataset

MODALITIES = ("image", "text", "fused")
COUNT = 12


@pytest.fixture(scope="module")
def rows():
    return list(SceneDataset(5, COUNT, unique=True, columns=["image", "captions", "hard_negatives"]))


def random_corpus(seed=0):
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(COUNT, 6, generator=generator)
    noisy = [normalize(content + torch.randn(COUNT, 6, generator=generator), dim=-1) for _ in range(4)]
    distractors = normalize(torch.randn(20, 6, generator=generator), dim=-1)
    return MixedCorpus(noisy[0], dict(zip(MODALITIES, noisy[1:], strict=True)), distractors)


def plain_ndcg(queries, documents, distractors):
    """By sorting, without ties."""
    corpus = torch.cat([*documents.values(), distractors]).tolist()
    total = 0.0
    for number, query in enumerate(queries.tolist()):
        scores = [sum(a * b for a, b in zip(query, document, strict=True)) for document in corpus]
        order = sorted(range(len(corpus)), key=lambda document: -scores[document])[:10]
        right = {number + kind * COUNT for kind in range(3)}
        gain = sum(1 / math.log2(2 + place) for place, document in enumerate(order) if document in right)
        total += gain / sum(1 / math.log2(2 + place) for place in range(3))
    return total / len(queries)


@pytest.mark.parametrize("seed", range(3))
def test_figures_equal_a_plain_reference(seed):
    queries, documents, distractors = random_corpus(seed)
    figures = mixed_corpus_figures(MixedCorpus(queries, documents, distractors))
    expected = plain_ndcg(queries, documents, distractors)
    assert 0.1 < expected < 0.9
    assert figures["ndcg@10"] == pytest.approx(expected, abs=1e-6)
    assert figures["modality_gap"] == modality_gap(documents)
    corpus = torch.cat([*documents.values(), distractors])
    best = (queries @ corpus.T).topk(11).indices  # the document itself and at most 10 before it
    for kind, modality in enumerate(MODALITIES):
        own = torch.arange(COUNT) + kind * COUNT
        assert figures[f"{modality}_recall@10"] == pytest.approx((best[:, :10] == own[:, None]).any(1).double().mean())


def test_a_model_that_knows_everything_has_one_and_a_blind_one_finds_nothing():
    known = one_hot(torch.arange(COUNT), COUNT).float()
    figures = mixed_corpus_figures(MixedCorpus(known, dict.fromkeys(MODALITIES, known), 0.5 * known))
    assert figures == pytest.approx(
        {"ndcg@10": 1, "image_recall@10": 1, "text_recall@10": 1, "fused_recall@10": 1, "modality_gap": 0}
    )
    blind = torch.ones(COUNT, 4) / 2
    figures = mixed_corpus_figures(MixedCorpus(blind, dict.fromkeys(MODALITIES, blind)))
    # Any order is as good as any other: a place holds a right document once in COUNT times.
    discounts = [1 / math.log2(2 + place) for place in range(10)]
    assert figures["ndcg@10"] == pytest.approx(sum(discounts) / COUNT / sum(discounts[:3]))
    assert figures["image_recall@10"] == figures["text_recall@10"] == 0


def test_a_gap_costs_and_several_vectors_are_compared_by_maxsim():
    queries, documents, distractors = random_corpus()
    far = {**documents, "image": normalize(documents["image"] - 5 * queries.mean(0, keepdim=True), dim=-1)}
    figures, worse = (mixed_corpus_figures(MixedCorpus(queries, parts, distractors)) for parts in (documents, far))
    assert worse["ndcg@10"] < figures["ndcg@10"] and worse["modality_gap"] > figures["modality_gap"]
    twice = [torch.stack([embeds, embeds], dim=1) for embeds in (queries, *documents.values(), distractors)]
    several = mixed_corpus_figures(MixedCorpus(twice[0], dict(zip(MODALITIES, twice[1:4], strict=True)), twice[4]))
    assert several == pytest.approx(figures)


def test_corpus_is_made_of_the_rows(tiny_model, tiny_processor, rows):
    images = [row["image"] for row in rows]
    asked, told, joined = ([row["captions"][number] for row in rows] for number in range(3))
    corpus = MixedCorpus(
        embed_texts(tiny_model, tiny_processor, asked),
        {
            "image": embed_images(tiny_model, tiny_processor, images),
            "text": embed_texts(tiny_model, tiny_processor, told),
            "fused": embed_fused(tiny_model, tiny_processor, images, joined),
        },
        embed_texts(tiny_model, tiny_processor, [text for row in rows for text in row["hard_negatives"]]),
    )
    expected = mixed_corpus_figures(corpus)
    assert evaluate_mixed_corpus(tiny_model, tiny_processor, iter(rows), batch_size=5) == pytest.approx(expected)
    without = [{**row, "hard_negatives": None} for row in rows]
    assert evaluate_mixed_corpus(tiny_model, tiny_processor, without)["ndcg@10"] > expected["ndcg@10"]


@pytest.mark.parametrize(
    "config", [{}, {"num_embedding_tokens": 3, "embedding_pooling": "multi_vector"}], ids=["one", "several"]
)
def test_a_calibrated_model_is_measured_as_it_is(tiny_processor, rows, config):
    model = build_model(**config)
    before, plain = (measure(model, tiny_processor, rows) for measure in (evaluate_mixed_corpus, embed_mixed_corpus))
    calibrate(model, tiny_processor, SceneDataset(6, 20, columns=["image", "captions"]))
    after = evaluate_mixed_corpus(model, tiny_processor, rows)
    assert after["modality_gap"] < before["modality_gap"] / 2
    assert mixed_corpus_figures(plain.calibrated(model.calibrator)) == pytest.approx(after, abs=1e-5)
    with uncalibrated(model):
        assert evaluate_mixed_corpus(model, tiny_processor, rows) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ["a", "b", "b", "a"]}, "row 2 has 1 images and 2 different captions; expected 1 and 3 or more"),
        ({"image": None}, "row 2 has 0 images and 3 different captions"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tiny_model, tiny_processor, rows, change, message):
    captions = {"captions": ["a", "b", "c"]}
    with pytest.raises(ValueError, match=message):
        evaluate_mixed_corpus(tiny_model, tiny_processor, [*rows[:2], {**rows[2], **captions, **change}, *rows[3:]])


def test_too_few_rows_are_refused(tiny_model, tiny_processor, rows):
    with pytest.raises(ValueError, match="`queries` has 9 rows; expected 10 or more"):
        evaluate_mixed_corpus(tiny_model, tiny_processor, rows[:9])
    with pytest.raises(ValueError, match="`rows` is empty; expected 10 or more"):
        evaluate_mixed_corpus(tiny_model, tiny_processor, [])
    queries, documents, _ = random_corpus()
    with pytest.raises(ValueError, match=r"`documents` has \{'text': 11\} rows by modality; expected 12 of each"):
        mixed_corpus_figures(MixedCorpus(queries, {**documents, "text": documents["text"][1:]}))


def test_hard_negatives_that_are_true_of_another_row_are_no_distractors(tiny_model, tiny_processor, rows):
    count = len(embed_mixed_corpus(tiny_model, tiny_processor, rows).distractors)
    other = [*rows[:-1], {**rows[-1], "hard_negatives": [*rows[-1]["hard_negatives"], rows[0]["captions"][1]]}]
    assert len(embed_mixed_corpus(tiny_model, tiny_processor, other).distractors) == count
