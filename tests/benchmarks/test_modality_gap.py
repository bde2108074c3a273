"""The benchmark of mixed corpora, on a random model."""

from statistics import mean

import pytest
from tiny_models import build_model

from benchmarks import modality_gap
from benchmarks.mixed_corpus import evaluate_mixed_corpus
from mmgem.training.evaluation.calibration import uncalibrated


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [{}, {"num_embedding_tokens": 3, "embedding_pooling": "multi_vector"}], ids=["one", "several"]
)
def test_a_row_for_each_sample_size_and_what_it_gained(tiny_processor, config):
    model = build_model(**config)
    corpora = modality_gap.build_corpora(2, 12)
    lines = modality_gap.compare(model, tiny_processor, (4, 8), corpora).splitlines()
    before, smaller, larger = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    titles = ["not calibrated", "calibrated on 4 scenes", "calibrated on 8 scenes"]
    assert [row[0] for row in (before, smaller, larger)] == titles
    assert before[2] == ""

    after = [evaluate_mixed_corpus(model, tiny_processor, corpus) for corpus in corpora]
    with uncalibrated(model):
        plain = [evaluate_mixed_corpus(model, tiny_processor, corpus) for corpus in corpora]
    columns = dict(zip(modality_gap.HEADER, zip(before, larger, strict=True), strict=True))
    for title, figure in (("nDCG@10", "ndcg@10"), ("gap", "modality_gap"), ("finds the image", "image_recall@10")):
        for cell, results in zip(columns[title], (plain, after), strict=True):
            assert float(cell.split(" ± ")[0]) == pytest.approx(mean(row[figure] for row in results), abs=6e-4)
    gain = mean(new["ndcg@10"] - old["ndcg@10"] for new, old in zip(after, plain, strict=True))
    assert float(larger[2].split(" ± ")[0]) == pytest.approx(gain, abs=6e-4)
    assert float(columns["gap"][1].split(" ± ")[0]) < float(columns["gap"][0].split(" ± ")[0])
