"""The scores of mteb beside ours, and quantized weights, on a folder of seconds and a random model."""

import json

import pytest
from encoders import picture
from tiny_models import build_model

from benchmarks import mteb_score, quantization
from mmgem.processing import save_sentence_transformer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_processor) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_sentence_transformer(build_model(), tiny_processor, folder)
    return str(folder)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    lines = []
    for number in range(6):
        picture(number).save(folder / f"{number}.png")
        captions = [] if number == 0 else [f"{number} stars", f"a star {number}"]
        lines.append(json.dumps({"file_name": f"{number}.png", "captions": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_rows_without_captions_are_left_out(photographs):
    assert [row["file_name"] for row in mteb_score.read_rows(photographs, 3)] == ["1.png", "2.png", "3.png"]


def test_our_scores_are_shares_that_grow(checkpoint, photographs):
    found = mteb_score.score_ourselves(checkpoint, photographs, mteb_score.read_rows(photographs, 9))
    assert 0 <= found[1] <= found[5] == found[10] == 1


@pytest.mark.slow
def test_mteb_computes_the_same(checkpoint, photographs):
    pytest.importorskip("mteb")
    rows = mteb_score.read_rows(photographs, 9)
    ours = mteb_score.score_ourselves(checkpoint, photographs, rows)
    assert mteb_score.score_by_mteb(checkpoint, photographs, rows) == pytest.approx(ours, abs=1e-4)


@pytest.mark.slow
def test_every_kind_of_weights_has_a_row(checkpoint, photographs):
    pytest.importorskip("torchao")
    table = quantization.compare(checkpoint, photographs, mteb_score.read_rows(photographs, 9))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(quantization.weight_kinds())
    assert rows[0][5:7] == ["1.0000", "1.0000"] and float(rows[1][1]) < float(rows[0][1])
