"""The scores of mteb beside ours, and quantized weights, on a folder of seconds and a random model."""

import json
import sys

import pytest
import torch
from encoders import close, multi_vector_model, picture
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from tiny_models import build_model
from typer.testing import CliRunner

from benchmarks import mteb_score, quantization
from mmgem.processing import save_sentence_transformer
from mmgem.training.cli import app
from mmgem.training.evaluation.mteb_scores import find_tasks, wrap_model


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
@pytest.mark.parametrize("all_vectors", [False, True])
def test_the_command_runs_tasks_of_mteb(photographs, tiny_processor, tmp_path, monkeypatch, all_vectors):
    pytest.importorskip("mteb")
    save_sentence_transformer(multi_vector_model(prompts=None), tiny_processor, tmp_path / "model")
    rows, model = mteb_score.read_rows(photographs, 9), str(tmp_path / "model")
    task = mteb_score.photographs_task(photographs, rows)
    monkeypatch.setitem(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY, "Photographs", task)
    options = ["--out", str(tmp_path / "out"), "--json", *["--all-vectors"] * all_vectors]

    def run() -> dict:
        result = CliRunner().invoke(app, ["evaluate", model, *options, "--mteb", "Photographs"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    [score] = run()["tasks"]
    assert (score["task"], score["measure"]) == ("Photographs", "recall_at_1")
    assert score["score"] == pytest.approx(
        mteb_score.score_ourselves(model, photographs, rows, all_vectors)[1], abs=1e-4
    )
    [file] = (tmp_path / "out").rglob("Photographs.json")
    assert json.loads(file.read_text())["scores"]["test"][0]["main_score"] == score["score"]

    monkeypatch.setattr(task, "load_data", lambda *arguments, **options: pytest.fail("it ran again"))
    assert run()["tasks"] == [score]
    save_sentence_transformer(build_model(), tiny_processor, model)  # whose results are not those of the other weights
    assert wrap_model(model).mteb_model_meta.revision not in file.parts


@pytest.mark.slow
@pytest.mark.parametrize(("all_vectors", "encoder"), [(False, SentenceTransformer), (True, MultiVectorEncoder)])
def test_mteb_gets_the_vectors_of_the_encoders(tiny_processor, tmp_path, all_vectors, encoder):
    pytest.importorskip("mteb")
    save_sentence_transformer(multi_vector_model(prompts=None), tiny_processor, tmp_path)
    ours, stock = wrap_model(tmp_path, all_vectors).model, encoder(str(tmp_path), trust_remote_code=True, device="cpu")
    inputs = ["a red star", picture(1), {"image": picture(2), "text": "in green"}]
    for one, other in ((ours.encode_query, stock.encode_query), (ours.encode_document, stock.encode_document)):
        for vectors, expected in zip(one(inputs), other(inputs), strict=True):  # of an image that asks there is one
            assert close(vectors, torch.as_tensor(expected))
    assert ours.similarity_fn_name == stock.similarity_fn_name


@pytest.mark.slow
def test_mteb_takes_images_with_texts_and_prompts(tiny_processor, tmp_path):
    mteb = pytest.importorskip("mteb")
    save_sentence_transformer(multi_vector_model(prompts={"edit": "then: "}), tiny_processor, tmp_path)
    wrapped = wrap_model(tmp_path)
    assert wrapped.model_prompts["CIRRIT2IRetrieval-query"] == "then: " and "query" not in wrapped.model_prompts
    from mteb.mocks import ALL_MOCK_TASK_TEST_GRID  # of every type, each of two rows

    tasks = [task for task in ALL_MOCK_TASK_TEST_GRID if set(task.metadata.modalities) == {"image", "text"}]
    results = mteb.evaluate(wrapped, tasks, cache=None).task_results
    assert len(results) == len(tasks) > 5 and all(0 <= result.get_score() <= 1 for result in results)


@pytest.mark.slow
def test_names_that_mteb_does_not_know():
    pytest.importorskip("mteb")
    assert list(find_tasks(["CIFAR10ZeroShot"])) == ["CIFAR10ZeroShot"]
    assert len(find_tasks(["MIEB(lite)"])["MIEB(lite)"]) > 40
    with pytest.raises(ValueError, match=r"'mieb-lite', which mteb .* such as MIEB\(lite\), "):
        find_tasks(["mieb-lite"])


@pytest.mark.slow
def test_every_kind_of_weights_has_a_row(checkpoint, photographs):
    pytest.importorskip("torchao")
    table = quantization.compare(checkpoint, photographs, mteb_score.read_rows(photographs, 9))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(quantization.weight_kinds())
    assert rows[0][5:7] == ["1.0000", "1.0000"] and float(rows[1][1]) < float(rows[0][1])
