"""What the benchmark of budgets measures, on embeddings whose recall is known."""

import pytest
import torch
from image_folders import build_multi_vector_model
from torch.nn.functional import normalize

from benchmarks import budgets
from benchmarks.budgets import Embedded, recall_by_code, recall_by_vectors
from mmgem.training.evaluation.metrics import recall_by_budget


def embedded(*shape, noise=0.0):
    """Images at random, of each two captions beside it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(*shape, generator=generator)
    captions = images.repeat_interleave(2, dim=0)
    captions = captions + noise * torch.randn(captions.shape, generator=generator)
    right = [{number} for number in range(len(images)) for _ in range(2)]
    return Embedded(normalize(captions, dim=-1), normalize(images, dim=-1), right)


def test_float32_codes_find_what_vectors_find():
    scenes = embedded(60, 16, noise=0.8)
    found = [code for code in recall_by_code(scenes) if code.precision == "float32"]
    expected = recall_by_budget(*scenes, dimensions=[16, 8, 4, 2])
    assert [code.dimensions for code in found] == [16, 8, 4, 2]
    assert [code.recall for code in found] == pytest.approx([budget.recall for budget in expected])
    assert [code.bytes_per_document for code in found] == [budget.bytes_per_document for budget in expected]
    assert 0 < found[-1].recall < found[0].recall < 1


def test_codes_of_other_precisions_are_smaller_and_find_less():
    exact, int8, binary = recall_by_code(embedded(60, 16, noise=0.5))[:3]
    assert (exact.bytes_per_document, int8.bytes_per_document, binary.bytes_per_document) == (64, 16, 2)
    assert int8.recall == pytest.approx(exact.recall, abs=0.03)
    assert 0.3 < binary.recall < exact.recall


def test_several_vectors_are_measured_in_every_pair_and_codes_of_the_first():
    scenes = embedded(20, 4, 8)
    assert recall_by_vectors(scenes.first_vectors()) == []
    found = recall_by_vectors(scenes)
    counts = [(budget.query_vectors, budget.document_vectors) for budget in found]
    assert sorted(counts) == [(query, document) for query in (1, 2, 4) for document in (1, 2, 4)]
    assert recall_by_code(scenes) == recall_by_code(scenes.first_vectors())
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in budgets.tables(found, []).splitlines()]
    assert table[2:5] == [
        [str(count), str(count * 32)]
        + [f"{b.recall:.3f}" for q in (1, 2, 4) for b in found if (b.query_vectors, b.document_vectors) == (q, count)]
        for count in (1, 2, 4)
    ]


@pytest.mark.slow
def test_scenes_are_embedded_and_the_budgets_drawn(tiny_processor, tmp_path):
    scenes = budgets.embed_scenes(build_multi_vector_model(num_embedding_tokens=2), tiny_processor, 70)
    assert scenes.images.shape == (70, 2, 16) and len(scenes.captions) == len(scenes.right) > 140
    assert scenes.right[0] == {0} and scenes.right[-1] == {69}
    by_vectors, by_code = recall_by_vectors(scenes), recall_by_code(scenes)
    budgets.draw_plot(by_vectors, by_code, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    lines = budgets.tables(by_vectors, by_code).splitlines()
    assert lines[-1].startswith("| 2 |") and len([line for line in lines if "---:" in line]) == 2
