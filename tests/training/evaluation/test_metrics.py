"""Metrics against plain references and analytic cases."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from mmgem.training.evaluation import metrics
from mmgem.training.evaluation.metrics import (
    Mean,
    agreement,
    answer_accuracy,
    bleu4,
    caption_variety,
    cider,
    meteor,
    pointing_hits,
    prior_accuracy,
    recall_at,
    recall_by_budget,
    retrieval_ranks,
)
from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE


def _ranks_by_sorting(queries, gallery, right):
    """As `retrieval_ranks`, without ties: sort, and find the first right row."""
    ranks = []
    for query, rows in zip(queries, right, strict=True):
        order = np.argsort(-(gallery @ query), kind="stable")
        ranks.append(next(rank for rank, row in enumerate(order) if row in rows))
    return ranks


@pytest.mark.parametrize("max_scores", [2**24, 100, 1])  # at once, in parts, a query at a time
def test_ranks_equal_sorting(max_scores, monkeypatch):
    monkeypatch.setattr(metrics, "_MAX_SCORES", max_scores)
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(40, 6)), rng.normal(size=(25, 6))
    right = [set(rng.choice(25, size=rng.integers(1, 5), replace=False).tolist()) for _ in queries]
    ranks = retrieval_ranks(torch.tensor(queries), torch.tensor(gallery), right)
    assert ranks.tolist() == _ranks_by_sorting(queries, gallery, right)


def test_maxsim_looks_for_the_vectors_of_the_side_that_asks():
    generator = torch.Generator().manual_seed(0)
    images, texts = (normalize(torch.randn(7, k, 6, generator=generator), dim=-1) for k in (4, 2))
    own = [{number} for number in range(7)]
    scores = torch.stack([torch.stack([(text @ image.T).amax(1).mean() for text in texts]) for image in images])
    expected = (scores > scores.diagonal()[:, None]).sum(1)
    assert torch.equal(retrieval_ranks(images, texts, own, gallery_asks=True), expected)
    assert not torch.equal(retrieval_ranks(images, texts, own), expected)


def test_ranks_of_perfect_reversed_and_collapsed_embeddings():
    one_hot = torch.eye(5)
    own = [{row} for row in range(5)]
    assert retrieval_ranks(one_hot, one_hot, own).tolist() == [0] * 5
    assert retrieval_ranks(one_hot, -one_hot, own).tolist() == [4] * 5
    assert retrieval_ranks(torch.ones(5, 3), torch.ones(5, 3), own).tolist() == [4] * 5  # ties are not found
    assert retrieval_ranks(torch.full((5, 3), torch.nan), torch.ones(5, 3), own).tolist() == [4] * 5
    assert retrieval_ranks(torch.ones(5, 3), torch.ones(5, 3), [set(range(5))] * 5).tolist() == [0] * 5


def test_ranks_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="`right` holds 1 entries; expected 2"):
        retrieval_ranks(torch.eye(2), torch.eye(2), [{0}])
    with pytest.raises(ValueError, match="`right` is empty for query 1"):
        retrieval_ranks(torch.eye(2), torch.eye(2), [{0}, set()])
    for outside in (-1, 2):
        with pytest.raises(ValueError, match=rf"`right` is \[.*{outside}.*\] for query 1; expected rows from 0 to 1"):
            retrieval_ranks(torch.eye(2), torch.eye(2), [{0}, {1, outside}])


def test_recall():
    ranks = torch.tensor([0, 0, 3, 4, 5, 10])
    assert [recall_at(ranks, k) for k in (1, 5, 10, 11)] == pytest.approx([2 / 6, 4 / 6, 5 / 6, 1])


def test_fidelity_judges_meaning_not_words():
    judge = SCENE_JUDGE
    references = ["a red star at the top", "a blue moon on the left", "a cat on a sofa"]
    captions = ["at the top a small solid red star", "a blue moon on the right", "a cat on a sofa"]
    assert judge.caption_fidelity(captions, references) == 0.5  # the third is not of a scene
    assert judge.caption_fidelity(captions[2:], references[2:]) is None
    assert judge.caption_fidelity([""], references[:1]) == 0
    assert judge.region_caption_fidelity(["a little red star", "a big red star"], ["a red star", "a red star"]) == 0.5
    assert agreement(["a", "b", "c", "d"], ["a", "b", "c", "x"]) == 0.75


def test_a_judge_fits_what_it_can_mostly_read():
    scenes, photographs = ["a red star at the top"], ["a man on a red horse", "two dogs"]
    assert (
        SCENE_JUDGE.fits(scenes, ["a red star"]) and SCENE_JUDGE.fits([], []) and SCENE_JUDGE.fits(scenes, ["a dog"])
    )
    assert not SCENE_JUDGE.fits(photographs, ["a red ball"]) and not SCENE_JUDGE.fits(
        [], ["a dog", "a hat", "a red ball"]
    )


def test_cider_is_ten_for_the_reference_and_zero_for_other_words():
    references = [["a red star at the top"], ["one blue moon on this left"], ["two green hearts below them"]]
    exact = ["A red star, at the top.", "one blue moon on this left!", "two green hearts below them"]
    assert float(cider(exact, references)) == pytest.approx(10)
    assert float(cider(["x y z w"] * 3, references)) == 0
    assert 0 < float(cider(["a red moon at the top", *exact[1:]], references)) < 10
    assert float(cider(exact[:2], references[:2])) == pytest.approx(10)  # two are enough


def test_bleu_is_one_for_the_reference_and_has_the_brevity_penalty(capsys):
    references = [["a red star at the top", "a star"], ["one blue moon on this left side"]]
    exact = ["A red star at the top.", "one blue moon on this left side"]
    assert bleu4(exact, references) == pytest.approx(1)
    short = ["a red star at", "one blue moon on"]  # all of their words, pairs, ... are right; 8 words for 13
    assert bleu4(short, [own[:1] for own in references]) == pytest.approx(math.exp(1 - 13 / 8))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("java", ["/usr/bin/java", None])
def test_meteor_asks_java_or_says_that_it_is_not_there(java, monkeypatch):
    class Meteor:
        def compute_score(self, originals, candidates):
            assert (originals, candidates) == ({0: ["a red star", "stars"]}, {0: ["a star"]})
            return 0.25, [0.5]

    monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", Meteor)
    monkeypatch.setattr("shutil.which", lambda name: java if name == "java" else "something else")
    if java is None:
        with pytest.raises(FileNotFoundError, match="`java` is not installed"):
            meteor(["A star."], [["a red star", "Stars"]])
    else:
        assert meteor(["A star."], [["a red star", "Stars"]]) == 0.25


def test_a_prior_knows_the_most_frequent_answer_to_each_type_of_question():
    questions = ["what is red?", "What is blue?", "what is it?", "how many stars?", "how many dogs are there?"]
    assert prior_accuracy(questions, ["a star", "star", "moon", "two", "three"]) == 3 / 5


def test_variety_of_captions():
    captions = ["A dog.", "a dog", "a cat runs", "two cats"]
    assert caption_variety(captions) == {
        "caption_distinct": 3 / 4,
        "caption_most_repeated": 2 / 4,
        "caption_length": 9 / 4,
    }


def test_an_interval_is_that_of_the_normal_distribution_where_values_are_many():
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.3
    low, high = Mean(values).interval()
    share, width = float(Mean(values)), 1.96 * math.sqrt(0.3 * 0.7 / 4000)
    assert (low, high) == pytest.approx((share - width, share + width), abs=0.002)
    # Five values of an image that are all the same tell no more than one.
    wide = Mean(values[:800].repeat_interleave(5), torch.arange(800).repeat_interleave(5)).interval()
    assert wide == pytest.approx(Mean(values[:800]).interval())
    assert wide[1] - wide[0] > 2 * (high - low)


@pytest.mark.parametrize(("level", "deviations"), [(0.5, 0.674), (0.9, 1.645)])
def test_the_level_of_an_interval_is_how_often_it_holds_the_mean(level, deviations):
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0)) < 0.3
    share, width = float(Mean(values)), deviations * math.sqrt(0.3 * 0.7 / 4000)
    assert Mean(values).interval(level) == pytest.approx((share - width, share + width), abs=0.001)


def test_an_interval_is_the_same_in_parts(monkeypatch):
    mean = Mean(torch.rand(50, generator=torch.Generator().manual_seed(0)))
    whole = mean.interval()
    monkeypatch.setattr(metrics, "_MAX_SCORES", 7 * 50)
    assert mean.interval() == whole
    assert len({*mean.interval(samples=1)}) == 1


def test_cider_refuses_what_means_nothing():
    with pytest.raises(ValueError, match="`captions` is of 1 images; expected 2 or more"):
        cider(["a"], [["a"]])
    with pytest.raises(ValueError, match="`references` holds 1 entries; expected 2"):
        cider(["a", "b"], [["a"]])


@pytest.mark.parametrize("max_scores", [2**24, 100, 1])
def test_ranks_of_several_vectors_equal_brute_force(max_scores, monkeypatch):
    monkeypatch.setattr(metrics, "_MAX_SCORES", max_scores)
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(9, 3, 5, generator=generator), torch.randn(7, 2, 5, generator=generator)
    scores = [[np.mean([max(v @ w for w in d) for v in q]) for d in gallery.numpy()] for q in queries.numpy()]
    ranks = retrieval_ranks(queries, gallery, [{row % 7} for row in range(9)])
    assert ranks.tolist() == [sum(s > own[row % 7] for s in own) for row, own in enumerate(scores)]
    assert len(set(ranks.tolist())) > 2


@pytest.mark.parametrize("vectors", [1, 4])
def test_no_more_scores_are_held_than_may_be(vectors, monkeypatch):
    held = []

    def similarity(queries, gallery):
        held.append(len(queries) * gallery[..., 0].numel())  # of a query's vector with all vectors of the gallery
        return metrics_similarity(queries, gallery)

    metrics_similarity = metrics.similarity
    monkeypatch.setattr(metrics, "similarity", similarity)
    monkeypatch.setattr(metrics, "_MAX_SCORES", 40)
    embeds = torch.randn(9, vectors, 3, generator=torch.Generator().manual_seed(0))
    retrieval_ranks(embeds, embeds, [{row} for row in range(9)])
    assert max(held) == 36 and sum(held) == 9 * 9 * vectors


def test_ranks_of_one_vector_and_of_several_do_not_mix():
    with pytest.raises(ValueError, match="query_embeds"):
        retrieval_ranks(torch.ones(2, 3), torch.ones(2, 1, 3), [{0}, {1}])


def test_what_a_budget_leaves_out_does_not_matter():
    # Of two vectors of three dimensions only the very first number finds the right document; the others mislead.
    queries, gallery = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
    queries[:, 0, 0] = gallery[:, 0, 0] = torch.tensor([0.1, -0.1])
    queries[:, 0, 2] = torch.tensor([1.0, -1.0])
    gallery[:, 0, 2] = torch.tensor([-1.0, 1.0])
    queries[:, 1, 0] = torch.tensor([1.0, -1.0])
    gallery[:, 1, 0] = torch.tensor([-9.0, 9.0])
    budgets = recall_by_budget(queries, gallery, [{0}, {1}], vectors=[(1, 1), (2, 2)], dimensions=[1, 2, 3])
    assert [budget[:4] for budget in budgets] == [(r, r, d, 4 * r * d) for r in (1, 2) for d in (1, 2, 3)]
    assert [budget.recall for budget in budgets] == [1, 1, 0, 0, 0, 0]


def test_a_budget_has_unit_vectors():
    # Cut to one dimension, all three are the same direction, so that none is found; 9 is not more than 1.
    gallery = torch.tensor([[1.0, 0.0], [9.0, 1.0], [5.0, 2.0]])
    (cut, whole) = recall_by_budget(gallery, gallery, [{0}, {1}, {2}], dimensions=[1, 2])
    assert (cut.recall, whole.recall) == (0, 1)
    assert (cut.query_vectors, cut.document_vectors, cut.bytes_per_document) == (1, 1, 4)


def test_the_whole_budget_is_the_recall_of_all():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (normalize(torch.randn(8, 3, 6, generator=generator).double(), dim=-1) for _ in range(2))
    right = [{row} for row in range(8)]
    (budget,) = recall_by_budget(queries, gallery, right)
    assert budget == (3, 3, 6, 3 * 6 * 8, recall_at(retrieval_ranks(queries, gallery, right), 1))
    assert 0 < budget.recall < 1
    (budget,) = recall_by_budget(queries, gallery, right, vectors=[(1, 3)])
    assert budget.recall == recall_at(retrieval_ranks(queries[:, :1], gallery, right), 1)


def test_budgets_that_are_not_there_are_refused():
    embeds, right = torch.ones(2, 3, 4), [{0}, {1}]
    for vectors in ((0, 1), (1, 4), (4, 1)):
        with pytest.raises(ValueError, match=r"`vectors` holds .*; expected \(1, 1\) to \(3, 3\)"):
            recall_by_budget(embeds, embeds, right, vectors=[(1, 1), vectors])
    with pytest.raises(ValueError, match=r"`vectors` holds \(1, 2\); expected \(1, 1\) to \(1, 1\)"):
        recall_by_budget(embeds[:, 0], embeds[:, 0], right, vectors=[(1, 2)])
    for dimension in (0, 5):
        with pytest.raises(ValueError, match=f"`dimensions` holds {dimension}; expected numbers from 1 to 4"):
            recall_by_budget(embeds, embeds, right, dimensions=[4, dimension])


def test_answers_are_judged_by_their_words():
    references = ["a red star", "at the top left", "two", "yes", "A"]
    assert answer_accuracy(["Red star.", "at top left", "the two", "YES", "a"], references) == 1
    assert answer_accuracy(["a star red", "at the top", "3", "", "an"], references) == 0
    assert answer_accuracy(["red star", "", "", "", ""], references) == pytest.approx(1 / 5)


def test_a_hit_is_a_point_in_a_box_of_its_own():
    points = torch.tensor([[5.0, 5.0], [5.0, 5.0], [0.0, 9.0], [9.1, 3.0], [4.0, 0.0]])
    boxes = [[[0, 0, 4, 9], [4, 4, 6, 6]], [[0, 0, 4, 9]], [[0, 0, 4, 9]], [[5, 0, 9, 9]], [[0, 0, 4, 9]]]
    assert pointing_hits(points, boxes).tolist() == [True, False, True, False, True]  # edges included


@pytest.mark.parametrize(
    "measure",
    [agreement, answer_accuracy, prior_accuracy, SCENE_JUDGE.caption_fidelity, SCENE_JUDGE.region_caption_fidelity],
)
def test_one_reference_for_each_is_expected(measure):
    for given, references in ((["a"], ["a", "b"]), (["a", "b"], ["a"])):
        with pytest.raises(ValueError, match="zip"):
            measure(given, references)
    with pytest.raises(ValueError, match="zip"):
        pointing_hits(torch.zeros(2, 2), [[[0, 0, 1, 1]]])
