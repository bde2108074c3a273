"""The metrics of `evaluate` against the plain functions, offline."""

import shutil
import subprocess

import fresh_process
import pytest
import torch

from mmgem.training.evaluation.evaluate_metrics import (
    BLEU4,
    METEOR,
    AnswerAccuracy,
    CaptionVariety,
    CIDErD,
    RecallAtK,
)
from mmgem.training.evaluation.metrics import (
    answer_accuracy,
    bleu4,
    caption_variety,
    cider,
    recall_at,
    retrieval_ranks,
)

CAPTIONS = ["a red moon at the top", "one blue moon on this left", "two green hearts below"]
REFERENCES = [["a red star at the top", "a star"], ["one blue moon on this left"], ["two green hearts below them"]]
ANSWERS, RIGHT_ANSWERS = ["Red star.", "the two", "no", ""], ["a red star", "two", "yes", "left"]
OFFLINE = """
from mmgem.training.evaluation.evaluate_metrics import AnswerAccuracy, CIDErD, RecallAtK

print(RecallAtK().compute(predictions=[[0.1, 0.9], [0.8, 0.2]], references=[[0, 1], [1]], k=1))
print(AnswerAccuracy().compute(predictions=["two"], references=["Two"]))
print(CIDErD().compute(predictions=["a b c d", "e f g h"], references=[["a b c d"], ["e f g h"]]))
"""


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics")


def test_recall_from_scores_is_that_of_the_embeddings():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.eye(9)[:7, :], torch.randn(20, 9, generator=generator)
    right = [{number, 19 - number} for number in range(7)]
    ranks = retrieval_ranks(queries, gallery, right)
    scores = (queries @ torch.nn.functional.normalize(gallery, dim=-1).T).tolist()
    got = RecallAtK().compute(predictions=(queries @ gallery.T).tolist(), references=[sorted(own) for own in right])
    assert got == {f"recall@{k}": recall_at(ranks, k) for k in (1, 5, 10)}
    assert 0 < got["recall@1"] < got["recall@10"]
    assert set(RecallAtK().compute(predictions=scores, references=[[0]] * 7, k=3)) == {"recall@3"}


def test_any_of_several_right_answers_counts_and_ties_do_not():
    scores = [[0.9, 0.1, 0.8], [0.5, 0.5], [0.2, 0.3, 0.1, 0.0]]
    assert RecallAtK().compute(predictions=scores, references=[[1, 0], [0], [3, 0]], k=[1, 2]) == {
        "recall@1": pytest.approx(1 / 3),
        "recall@2": 1,
    }


def test_recall_refuses_what_is_not_in_the_gallery():
    with pytest.raises(ValueError, match=r"`right` is \[2\] for query 0; expected rows from 0 to 1"):
        RecallAtK().compute(predictions=[[0.9, 0.1]], references=[[2]])
    with pytest.raises(ValueError, match="`right` is empty"):
        RecallAtK().compute(predictions=[[0.9, 0.1]], references=[[]])


def test_texts_are_measured_as_by_the_plain_functions():
    assert CIDErD().compute(predictions=CAPTIONS, references=REFERENCES) == {
        "cider": float(cider(CAPTIONS, REFERENCES))
    }
    assert 0 < float(cider(CAPTIONS, REFERENCES)) < 10
    assert BLEU4().compute(predictions=CAPTIONS, references=REFERENCES) == {"bleu4": bleu4(CAPTIONS, REFERENCES)}
    assert CaptionVariety().compute(predictions=CAPTIONS) == caption_variety(CAPTIONS)
    got = AnswerAccuracy().compute(predictions=ANSWERS, references=RIGHT_ANSWERS)
    assert got == {"answer_accuracy": answer_accuracy(ANSWERS, RIGHT_ANSWERS)} == {"answer_accuracy": 0.5}


def test_batches_add_up():
    metric = CIDErD()
    metric.add_batch(predictions=CAPTIONS[:2], references=REFERENCES[:2])
    metric.add(prediction=CAPTIONS[2], reference=REFERENCES[2])
    assert metric.compute() == {"cider": float(cider(CAPTIONS, REFERENCES))}
    other, same = AnswerAccuracy(), AnswerAccuracy()  # which do not meet
    other.add_batch(predictions=ANSWERS[:2], references=RIGHT_ANSWERS[:2])
    same.add_batch(predictions=ANSWERS[2:], references=RIGHT_ANSWERS[2:])
    assert (other.compute(), same.compute()) == ({"answer_accuracy": 1}, {"answer_accuracy": 0})


def test_nothing_is_written(tmp_path):
    metric = AnswerAccuracy()
    metric.add_batch(predictions=ANSWERS, references=RIGHT_ANSWERS)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    metric.compute()


@pytest.mark.slow
def test_they_load_without_a_network(tmp_path):
    output = fresh_process.run(OFFLINE, cwd=tmp_path, installed=True)
    assert output.split("\n")[:2] == ["{'recall@1': 0.5}", "{'answer_accuracy': 1.0}"]
    assert "'cider': 10.0" in output


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is written in Java")
def test_meteor_is_that_of_the_best_reference(monkeypatch):
    start = subprocess.Popen
    without_paraphrases = ["-m", "exact stem"]  # whose table takes ten seconds to read
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: start(command + without_paraphrases, **options)
    )
    references = [["nothing of it", "a dog runs on the beach"], ["two boats on the sea"]]
    assert METEOR().compute(predictions=[own[-1] for own in references], references=references) == {"meteor": 1}


def test_meteor_names_what_it_lacks(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="`java` is not installed"):
        METEOR().compute(predictions=CAPTIONS, references=REFERENCES)
