import gc
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from filelock import FileLock
from image_folders import build_multi_vector_model
from PIL import Image
from transformers import GenerationConfig
from typer.testing import CliRunner

import mmgem
from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing import image_loading
from mmgem.training import captioning, cli_common, dtypes
from mmgem.training.captioning import CaptionReport
from mmgem.training.cli import app
from mmgem.training.evaluation.mteb_scores import score_tasks
from mmgem.training.inference import embed_images
from mmgem.training.printable import printable
from mmgem.training.recipes.check import StageCheck
from mmgem.training.recipes.run import TrainingReport
from mmgem.training.recipes.step_memory import StepMemory
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import MANIFEST, UNFINISHED
from mmgem.training.trainer.lora import add_lora

pytestmark = pytest.mark.usefixtures("short_answers")

COMMANDS = (
    "demo",
    "scenes",
    "train",
    "soup",
    "evaluate",
    "calibrate",
    "index",
    "search",
    "ask",
    "verify",
    "caption",
    "export",
    "push",
    "serve",
)


def run(*arguments, exit_code=0, input=None):
    """The result of `mmgem *arguments`, which must end with `exit_code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gallery(tmp_path):
    run("scenes", tmp_path / "gallery", "--seed", 5, "--count", 6)
    return tmp_path / "gallery"


def test_help_lists_the_commands_and_needs_no_heavy_import():
    code = (
        "import sys; from mmgem.training.cli import app; print([m for m in sys.modules if m in ('torch', 'datasets')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    output = run("--help").output
    assert all(command in output for command in COMMANDS)
    assert cli_common.MAX_PIXELS == image_loading.MAX_PIXELS  # which cannot be imported there


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "serve"])
def test_every_command_explains_itself_and_speaks_json(command):
    assert "--json" in run(command, "--help").output
    text = next(one.help for one in app.registered_commands if one.callback.__name__ == command)
    assert not re.search(r"[^\n]\n[^\n]", text)  # a terminal wraps paragraphs where it ends


def test_scenes_writes_an_image_folder(tmp_path):
    answer = json.loads(run("scenes", tmp_path / "out", "--count", 3, "--image-size", 64, "--json").stdout)
    assert answer == {"folder": str(tmp_path / "out"), "count": 3}
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [Image.open(tmp_path / "out" / row["file_name"]).size for row in rows] == [(64, 64)] * 3


def test_what_was_indexed_is_found(checkpoint, gallery, tmp_path):
    (gallery / "empty.png").write_bytes(b"")
    result = run("index", gallery, "--model", checkpoint, "--out", tmp_path / "index", "--json")
    answer = json.loads(result.stdout)
    assert answer["images"] == answer["embedded"] == len(list(gallery.glob("scene*.png")))
    assert [file["file_name"] for file in answer["skipped"]] == ["empty.png"]
    assert "left out empty.png" in result.stderr

    picture = sorted(gallery.glob("scene*.png"))[3]
    hits = json.loads(run("search", tmp_path / "index", "--image", picture, "--top", 2, "--json").stdout)
    assert len(hits) == 2 and hits[0]["path"] == str(picture) and hits[0]["score"] == 1
    [line] = run("search", tmp_path / "index", "a red star", "--top", 1).stdout.splitlines()
    assert line.split()[1].startswith(str(gallery))
    both = ("search", tmp_path / "index", "a red star", "--image", picture, "--model", checkpoint)
    assert len(run(*both, "--top", 3).stdout.splitlines()) == 3


def test_lora_makes_another_model(checkpoint, gallery, tmp_path):
    model = add_lora(MMGEMModel.from_pretrained(checkpoint), r=2, lora_alpha=64, init_lora_weights=False)
    model.save_pretrained(tmp_path / "lora")
    run("index", gallery, "--model", tmp_path / "lora", "--out", tmp_path / "index")
    query = "search", tmp_path / "index", "a red star", "--top", 1
    assert len(run(*query).stdout.splitlines()) == 1
    assert ", 0 new" in run("index", gallery, "--model", tmp_path / "lora", "--out", tmp_path / "index").stdout
    assert "embeds texts otherwise" in run(*query, "--model", checkpoint, exit_code=1).stderr


@pytest.mark.parametrize("command", ["index", "caption"])
def test_who_cannot_write_learns_it_before_a_model_is_loaded(command, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_common, "load_model", None)
    with FileLock(tmp_path / "out.lock"):  # as another job does
        error = run(command, gallery, "--model", "nobody/nothing", "--out", tmp_path / "out", exit_code=1).stderr
    assert "expected no other job at it" in error


@pytest.mark.parametrize("model", ["no/such/folder", "/nowhere", "../nowhere", "FOLDER"])
def test_what_is_no_checkpoint_is_refused_before_a_model_is_loaded(model, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(MMGEMConfig, "from_pretrained", None)
    model = str(tmp_path) if model == "FOLDER" else model
    error = run("index", gallery, "--model", model, "--out", tmp_path / "index", exit_code=1).stderr
    assert f"`model` is '{model}', neither a folder with a config.json" in error
    assert not (tmp_path / "index").exists()


def test_what_cannot_be_searched_is_refused_before_a_model_is_loaded(gallery, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(SearchIndex, "load", None)
    for command in (("search", tmp_path, "a star"), ("ask", tmp_path, "--image", "a.png")):
        assert "is no index" in run(*command, exit_code=1).stderr
    run("index", gallery, "--model", checkpoint, "--out", tmp_path / "index")
    for limit in (("--kind", "caption"), ("--where", "year=2020")):
        error = run("search", tmp_path / "index", "a star", *limit, exit_code=1).stderr
        assert limit[1].partition("=")[0] in error and "; expected" in error
    for command in (("search", ""), ("ask", "--search", " ")):
        error = run(command[0], tmp_path / "index", *command[1:], exit_code=1).stderr
        assert "expected something to look for" in error
    error = run("search", tmp_path / "index", "a star", "--image", tmp_path / "gone.png", exit_code=1).stderr
    assert "gone.png') is not there; expected" in error
    error = run("ask", tmp_path / "index", "--search", "a star", exit_code=1).stderr
    assert "has no memory; expected one that was made" in error
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / MANIFEST).touch()
    assert "still being made" in run("search", tmp_path, "a star", exit_code=1).stderr


def test_torch_is_set_up_unless_the_user_has(tmp_path, monkeypatch):
    """Before torch is imported, which reads it once; see also that `--help` does not import it."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    for policy in ("ACTIVE", "PASSIVE"):
        run("index", tmp_path / "nowhere", "--model", "m", "--out", tmp_path / "index", exit_code=1)
        assert os.environ["OMP_WAIT_POLICY"] == policy and os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
        monkeypatch.delenv("OMP_WAIT_POLICY")
    run("caption", tmp_path / "nowhere", "--model", "m", "--out", tmp_path / "file", exit_code=1)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    run("train", tmp_path / "nowhere.yaml", "--out", tmp_path / "run", exit_code=1)
    assert "OMP_WAIT_POLICY" not in os.environ


def test_every_command_looks_for_less_garbage_than_python_does(monkeypatch, tmp_path):
    set_to, at_end = [], []
    monkeypatch.setattr("gc.get_threshold", lambda: (700, 10, 10))
    monkeypatch.setattr("gc.set_threshold", lambda *numbers: set_to.append(numbers))
    monkeypatch.setattr("atexit.register", at_end.append)
    run("verify", tmp_path / "nowhere", exit_code=1)
    assert set_to == [(cli_common.OBJECTS, 50)] and at_end == [gc.freeze]
    monkeypatch.setattr("gc.get_threshold", lambda: (cli_common.OBJECTS, 50, 10))
    run("verify", tmp_path / "nowhere", exit_code=1)
    assert len(set_to) == 1


@pytest.fixture
def multi_vector_checkpoint(tiny_processor, tmp_path):
    build_multi_vector_model(4, prompts={"query": "Find "}).save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_an_index_holds_and_compares_what_it_is_told_to(multi_vector_checkpoint, gallery, tmp_path, monkeypatch):
    arguments = ("--model", multi_vector_checkpoint, "--out", tmp_path / "index", "--vectors", 3, "--dimensions", 8)
    result = run("index", gallery, *arguments, "--precision", "int8", "--with-memory", 2, "--json")
    assert json.loads(result.stdout)["bytes_per_image"] == 3 * 8 + 2 * 32 * 2

    queries = [
        (("star",), {"text": "star"}),
        (("star", "--vectors", 1), {"text": "star", "vectors": 1}),
        (("star", "--query-vectors", 2), {"text": "star", "query_vectors": 2}),
        (("star", "--prompt", "query", "--top", 3), {"text": "star", "prompt": "query", "top": 3}),
        (("star", "--image", "a.png", "--image", "b.png"), {"text": "star", "image": ["a.png", "b.png"]}),
        (
            ("--image", "a.png", "--boxes", "0,0,20,20", "--boxes", "9,9,40,50.5"),
            {"image": ["a.png"], "boxes": [[0, 0, 20, 20], [9, 9, 40, 50.5]]},
        ),
    ]
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(SearchIndex, "search", lambda self, *args: calls.append(args) or [])
        patch.setattr(image_loading, "load_image", lambda file: None)  # which are not there
        for query, _ in queries:
            run("search", tmp_path / "index", *query)
    names = list(inspect.signature(SearchIndex.search).parameters)[1:]
    given = [{name: value for name, value in zip(names, call, strict=True) if value is not None} for call in calls]
    assert given == [{"top": 10, **arguments} for _, arguments in queries]
    assert len(json.loads(run("search", tmp_path / "index", "star", "--vectors", 1, "--json").stdout)) == 10
    for query, message in [
        (("star", "--vectors", 4), "`vectors` is 4; expected 1 to 3"),
        (("star", "--prompt", "edit"), "`prompt` is 'edit'; expected one of 'query'"),
    ]:
        assert message in run("search", tmp_path / "index", *query, exit_code=1).stderr


@pytest.mark.parametrize(
    ("option", "states"), [((), 0), (("--with-memory",), 4), (("--with-memory", "1"), 1), (("--with-memory=2",), 2)]
)
def test_with_memory_may_stand_without_its_number(multi_vector_checkpoint, gallery, tmp_path, option, states):
    index = ("--model", multi_vector_checkpoint, "--out", tmp_path / "index", "--json")
    for arguments in ((*option, gallery, *index), (gallery, *index, *option)):
        result = json.loads(run("index", *arguments).stdout)
        assert result["bytes_per_image"] == 4 * 16 * 4 + states * 32 * 2


def test_an_index_is_asked_when_its_images_are_gone(multi_vector_checkpoint, gallery, tmp_path):
    index = tmp_path / "index"
    run("index", gallery, "--model", multi_vector_checkpoint, "--out", index, "--with-memory")
    names = sorted(path.name for path in gallery.glob("scene*.png"))[:2]
    shutil.rmtree(gallery)
    GenerationConfig(max_new_tokens=4, no_repeat_ngram_size=3).save_pretrained(multi_vector_checkpoint)
    with warnings.catch_warnings(action="error", category=UserWarning):  # such as that a memory has no ids
        run("ask", index, "what?", "--image", names[0])
    answers = json.loads(run("ask", index, "what?", "--image", names[0], "--image", names[1], "--json").stdout)
    assert [answer["path"] for answer in answers] == [str(gallery / name) for name in names]
    assert all(set(answer) == {"path", "answer", "score"} and answer["score"] is None for answer in answers)
    found = json.loads(run("ask", index, "--search", "star", "--top", 3, "--prompt", "query", "--json").stdout)
    hits = json.loads(run("search", index, "star", "--top", 3, "--prompt", "query", "--json").stdout)
    assert [(answer["path"], answer["score"]) for answer in found] == [(hit["path"], hit["score"]) for hit in hits]
    assert str(gallery / names[0]) in run("ask", index, "--image", names[0]).stdout
    assert "--top is how many" in run("ask", index, "--image", names[0], "--top", 2, exit_code=2).stderr
    assert "is not in the index" in run("ask", index, "--image", "gone.png", exit_code=1).stderr


def test_verify_names_what_is_damaged(checkpoint, gallery, tmp_path):
    index = tmp_path / "index"
    run("index", gallery, "--model", checkpoint, "--out", index)
    assert "all as written" in run("verify", index).stdout
    vectors = index / "embedding-1.npy"
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"!")
    answer = json.loads(run("verify", index, "--json", exit_code=1).stdout)
    assert answer["files"] == 3 and list(answer["damaged"]) == [vectors.name]
    assert vectors.name in run("verify", index, exit_code=1).stdout
    assert vectors.name in run("search", index, "a star", exit_code=1).stderr
    run("index", gallery, "--model", checkpoint, "--out", index)
    assert run("verify", index).stdout.endswith("all as written\n")
    (index / UNFINISHED).mkdir()
    assert "all as written; unfinished holds what a run has embedded that did not end" in run("verify", index).stdout


def test_an_index_follows_images_that_moved(checkpoint, gallery, tmp_path):
    arguments = ("--model", checkpoint, "--out", tmp_path / "index")
    run("index", gallery, *arguments)
    moved = gallery.rename(tmp_path / "moved")
    assert "--moved" in run("index", moved, *arguments, exit_code=1).stderr
    assert ", 0 new" in run("index", moved, *arguments, "--moved").stdout


def test_calibrate_leaves_a_model_that_is_calibrated(checkpoint, gallery, tmp_path):
    result = json.loads(run("calibrate", checkpoint, gallery, "--out", tmp_path / "out", "--json").stdout)
    assert set(result["counts"]) == {"image", "text", "fused"} and result["gap_after"] < result["gap_before"]
    model = MMGEMModel.from_pretrained(tmp_path / "out")
    assert model.config.calibrated_modalities == list(result["counts"])
    torch.testing.assert_close(model.calibrator.mean("image").norm() > 0, torch.tensor(True))
    assert "`out` is" in run("calibrate", checkpoint, gallery, "--out", tmp_path / "out", exit_code=1).stderr


def test_caption_writes_json_lines(checkpoint, gallery, tmp_path):
    arguments = ("caption", gallery, "--model", checkpoint, "--out", tmp_path / "captions.jsonl", "--boxes")
    answer = json.loads(run(*arguments, "--json").stdout)
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert answer["images"] == answer["captioned"] == len(lines) == len(list(gallery.glob("*.png")))
    assert all(len(line["boxes"]) == len(line["region_captions"]) for line in lines)
    assert ", 0 new" in run(*arguments).stdout


def test_captions_are_written_in_the_type_that_is_asked_for(checkpoint, gallery, tmp_path, monkeypatch):
    seen, report = [], CaptionReport(1, 1, [], {})
    monkeypatch.setattr(dtypes, "fastest_dtype", lambda model: torch.bfloat16)
    monkeypatch.setattr(
        captioning, "caption_folder", lambda folder, model, *others: seen.append(model.dtype) or report
    )
    for options in ((), ("--dtype", "auto"), ("--dtype", "float32")):
        run("caption", gallery, "--model", checkpoint, "--out", tmp_path / "c.jsonl", *options)
    assert seen == [torch.float32, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("end", ["\n", "\0"])
def test_files_are_named_by_standard_input(checkpoint, gallery, tmp_path, monkeypatch, end):
    monkeypatch.chdir(gallery.parent)
    names = sorted(path for path in gallery.rglob("*") if path.suffix == ".png")[:3]
    given = end.join([str(names[0]), f"./{names[1].relative_to(gallery.parent)}", str(names[0]), "", "gone.png", ""])
    index = tmp_path / "of-names"
    result = run("index", "-", "--model", checkpoint, "--out", index, "--json", input=given)
    assert json.loads(result.stdout)["rows"] == {"image": 2} and "not read: names of no file (1)" in result.stderr
    run("caption", "-", "--model", checkpoint, "--out", tmp_path / "c.jsonl", input=given)
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [str(name.relative_to(gallery.parent)) for name in names[:2]]
    hits = json.loads(run("search", index, "a red star", "--json").stdout)
    assert {hit["path"] for hit in hits} == set(map(str, names[:2]))
    arguments = ("index", "-", "--model", checkpoint, "--out", tmp_path / "none")
    result = run(*arguments, input="../outside.png", exit_code=1)
    assert "standard input names '../outside.png'; expected files below the current folder" in result.stderr
    for nothing in ("", "\n", "\0"):
        assert "standard input names no file; expected one on" in run(*arguments, input=nothing, exit_code=1).stderr


@pytest.mark.parametrize(
    ("words", "expected"), [("mmgem se", ["search", "serve"]), ("mmgem search --expl", ["--explain"])]
)
def test_a_shell_completes_commands_and_options(words, expected):
    environment = {"_MMGEM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = CliRunner().invoke(app, [], env=environment, prog_name="mmgem")
    assert sorted(result.stdout.split()) == expected


def test_evaluate_prints_figures(checkpoint, gallery, monkeypatch):
    figures = json.loads(run("evaluate", checkpoint, gallery, "--json").stdout)
    assert 0 <= figures["text_to_image_recall@1"] <= figures["text_to_image_recall@10"] == 1

    held_out = json.loads(run("evaluate", checkpoint, gallery, "--subset", 0, 0.6, "--json").stdout)
    assert held_out != figures

    low, high = figures["intervals"]["text_to_image_recall@1"]
    assert 0 <= low <= figures["text_to_image_recall@1"] <= high <= 1

    def evaluate_model(model, processor, dataset, batch_size, caption_judge, intervals, skipped):
        intervals["images"] = (5.5, 6.5)
        return {"images": len(dataset), "batch_size": batch_size}

    monkeypatch.setattr("mmgem.training.evaluation.evaluate.evaluate_model", evaluate_model)
    results = checkpoint / ".eval_results" / "me--scenes.yaml"
    assert str(results) in run("evaluate", checkpoint, gallery, "--dataset-id", "me/scenes").stdout
    assert "task_id: images" in results.read_text()
    result = run("evaluate", checkpoint, gallery, "--dataset-id", "scenes", exit_code=1)
    assert "expected OWNER/NAME of a dataset on the Hub" in result.stderr
    table = run("evaluate", checkpoint, gallery, "--batch-size", 2).stdout.splitlines()
    assert [line.split() for line in table] == [
        ["images", *"6.0000 5.5000 to 6.5000".split()],
        ["batch_size", "2.0000"],
    ]


def test_evaluate_takes_several_tasks_of_mteb(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr("mmgem.training.cli._evaluate_on_mteb", lambda *arguments: asked.update(last=arguments))
    run("evaluate", "model", "--mteb", "A", "B(lite)", "--out", tmp_path, "--mteb", "C")
    assert asked["last"] == ("model", ["A", "B(lite)", "C"], tmp_path, 64, False, None, False)

    for rest in ([], ["--all-vectors"], [tmp_path, "--all-vectors"], [tmp_path, "--mteb", "A"]):
        run("evaluate", "model", *rest, exit_code=2)
    run("evaluate", "model", "--mteb", "A", "--subset", 0, 1, exit_code=2)


def test_evaluate_says_that_mteb_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    result = run("evaluate", "model", "--mteb", "A", exit_code=1)
    assert re.fullmatch(r"mmgem: mteb cannot be imported .*; expected it for --mteb: pip install .*\n", result.stderr)


def test_evaluate_says_that_there_is_no_network(monkeypatch, tmp_path):
    def evaluate(*arguments, **options):
        raise ConnectionError("Couldn't reach 'mteb/flowers' on the Hub")

    mteb = SimpleNamespace(evaluate=evaluate, ResultCache=str)
    monkeypatch.setitem(sys.modules, "mteb", mteb)
    with pytest.raises(ConnectionError, match=r"cannot be had \(Couldn't reach .*; expected a connection"):
        score_tasks(None, {"Flowers": [None]}, tmp_path)


def test_json_has_no_nan(checkpoint, gallery, monkeypatch):
    monkeypatch.setattr(
        "mmgem.training.evaluation.evaluate.evaluate_model", lambda *arguments, **options: {"recall": float("nan")}
    )
    assert json.loads(run("evaluate", checkpoint, gallery, "--json").stdout) == {"recall": None}


def test_train_hands_the_recipe_on_and_keeps_stdout_for_its_answer(monkeypatch, tmp_path):
    calls = []

    def train(recipe, out, stage, resume):
        calls.append((str(recipe), str(out), stage, resume))
        print("{'loss': 1.0}")
        return TrainingReport(Path(out), {"recall": 0.5}, {"photos": 2})

    monkeypatch.setattr("mmgem.training.recipes.run.train", train)
    result = run("train", "cards/small/recipe.yaml", "--json")
    answer = {"model": "runs/small", "figures": {"recall": 0.5}, "skipped": {"photos": 2}}
    assert json.loads(result.stdout) == answer
    text = run("train", "quick.yaml", "--resume", "--stage", "2").stdout
    assert "recall  0.5000" in text and "2 of photos could not be read, see runs/quick/skipped.jsonl" in text
    run("train", "quick.yaml", "--out", tmp_path, "--stage", "align")
    monkeypatch.setenv("RANK", "1")  # the other processes of a distributed run say nothing
    assert run("train", "quick.yaml").stdout == ""
    assert calls == [
        ("cards/small/recipe.yaml", "runs/small", None, False),
        ("quick.yaml", "runs/quick", "2", True),
        ("quick.yaml", str(tmp_path), "align", False),
        ("quick.yaml", "runs/quick", None, False),
    ]


def test_train_check_says_what_it_sees_and_trains_nothing(monkeypatch):
    def check_recipe(recipe, out, stage, say):
        say(f"stage {stage} of {recipe}")
        memory = StepMemory(weights=1, copies=0, gradients=2, optimizer=3, activations=4)
        return [StageCheck("align", 10, 4, 100, 20, memory, 0.5, {"caption_loss": 1.0}, Path("a.png"), {})]

    monkeypatch.setattr("mmgem.training.recipes.check.check_recipe", check_recipe)
    monkeypatch.setattr("mmgem.training.recipes.run.train", None)
    assert run("train", "quick.yaml", "--check", "--stage", "align").stdout.startswith("stage align of quick.yaml")
    result = run("train", "quick.yaml", "--check", "--json")
    [answer] = json.loads(result.stdout)
    assert answer["memory"]["optimizer"] == 3 and answer["images"] == "a.png"
    assert "stage None of quick.yaml" in result.stderr


def test_soup_averages_models(checkpoint, tiny_model, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other")
    tiny_model.logit_scale.data += 1.0
    tiny_model.save_pretrained(tmp_path / "other")
    arguments = ("soup", tmp_path / "mean", checkpoint, tmp_path / "other", "--weight", 3, "--weight", 1)
    answer = json.loads(run(*arguments, "--json").stdout)
    assert answer["shares"] == {str(checkpoint): 0.75, str(tmp_path / "other"): 0.25}
    mean = MMGEMModel.from_pretrained(tmp_path / "mean").logit_scale
    torch.testing.assert_close(mean, tiny_model.logit_scale - 0.75)


def test_a_users_mistake_takes_one_line_and_exit_code_1(gallery, tmp_path):
    for arguments, part in [
        (("index", gallery, "--model", tmp_path, "--out", tmp_path / "index"), "`model` is"),
        (("evaluate", "no/such-model", tmp_path / "nowhere"), "nowhere"),
        (("search", tmp_path / "nowhere", "a star"), "`path` is"),
        (("train", tmp_path / "nowhere.yaml", "--out", tmp_path / "out"), "nowhere.yaml"),
        (("soup", tmp_path / "mean", tmp_path / "nowhere", gallery), "nowhere"),
        (("scenes", gallery), "gallery"),
        (("scenes", tmp_path / "new", "--image-size", 3), "image_size"),
    ]:
        result = run(*arguments, exit_code=1)
        [line] = [line for line in result.stderr.splitlines() if line.startswith("mmgem: ")]
        assert part in line and "Traceback" not in result.output and result.stdout == ""


def test_a_traceback_comes_when_asked_for_before_the_command_or_after(gallery):
    for arguments in ["--traceback", "scenes", str(gallery)], ["scenes", str(gallery), "--traceback"]:
        assert isinstance(CliRunner().invoke(app, arguments).exception, FileExistsError)
    result = CliRunner().invoke(
        app, ["scenes", "--", "--traceback", str(gallery)]
    )  # which is the name of a folder here
    assert result.exit_code == 2 and "unexpected extra argument" in result.output


def test_a_defect_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr("mmgem.training.scenes.dataset.write_scene_folder", broken)
    assert isinstance(CliRunner().invoke(app, ["scenes", str(tmp_path / "out")]).exception, ZeroDivisionError)


@pytest.mark.parametrize("name", ["a\x1b[2Jb\n★.png", "caf\u00e9\u202e.png"])
def test_names_are_printed_without_steering_the_terminal(checkpoint, gallery, tmp_path, name):
    shutil.copy(next(gallery.glob("scene*.png")), gallery / name)
    (gallery / f"bad{name}").touch()
    lines = run("index", gallery, "--model", checkpoint, "--out", tmp_path / "index").stderr.splitlines()
    [line] = [line for line in lines if line.startswith("left out")]
    found = run("search", tmp_path / "index", "--image", gallery / name, "--top", 2)
    for text in (line, found.stdout.replace("\n", "")):
        assert printable(name) in text and not {"\x1b", "\u202e"} & set(text)
    rows = json.loads(run("search", tmp_path / "index", "--image", gallery / name, "--top", 2, "--json").stdout)
    assert str(gallery / name) in [row["path"] for row in rows]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_no_name_costs_the_result(encoding):
    names = ["★.png", "caf\u00e9.png", "caf\udce9.png"]
    script = (
        "import sys; from mmgem.training.cli import app, answer\n"
        "@app.command()\n"
        f"def echo(as_json: bool = False): answer({names!r}, as_json, {names!r})\n"
        "app(sys.argv[1:])"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for option in ("--as-json", "--no-as-json"):
        command = [sys.executable, "-c", script, "echo", option]
        written = subprocess.run(command, capture_output=True, env=environment, check=True).stdout
        out = written.decode("utf-8" if encoding == "ascii" else encoding)  # click takes ASCII for a mistake
        assert json.loads(out) == names if option == "--as-json" else out.splitlines()[2] == r"caf\udce9.png"


def test_who_interrupts_is_told_how_to_go_on(checkpoint, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr("mmgem.training.search.item_embedder.embed_images", lambda *arguments: interrupt())

    def interrupt():
        raise KeyboardInterrupt

    result = run("index", gallery, "--model", checkpoint, "--out", tmp_path / "index", exit_code=130)
    assert result.stderr.splitlines()[-1].startswith("mmgem: interrupted; what is embedded is kept, and the same")


def test_a_job_that_is_ended_from_outside_keeps_what_it_has_embedded(checkpoint, gallery, tmp_path, monkeypatch):
    batches = []

    def embed(model, processor, images):
        batches.append(len(images))
        if len(batches) == 3:  # by a job system at its limit of time
            os.kill(os.getpid(), signal.SIGTERM)
        return embed_images(model, processor, images)

    arguments = ("index", gallery, "--model", checkpoint, "--out", tmp_path / "index", "--batch-size", 2)
    monkeypatch.setattr("mmgem.training.search.item_embedder.embed_images", embed)
    result = run(*arguments, exit_code=128 + signal.SIGTERM)
    assert result.stderr.splitlines()[-1].startswith("mmgem: interrupted by SIGTERM; what is embedded is kept, and")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    kept = sum(batches[:2])
    answer = json.loads(run(*arguments, "--json").stdout)
    assert kept == 4 and answer["embedded"] == answer["images"] - kept


def test_who_reads_no_further_is_told_nothing():
    reading, writing = os.pipe()
    os.close(reading)
    code = "from mmgem.training.cli import app; app.command('say')(lambda: print('x' * 100_000)); app(['say'])"
    process = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "mmgem: The answer cannot be written to standard output: No space left on device.\n"),
    ],
)
def test_streams_that_are_closed_or_full(streams, code, said):
    script = (
        "from mmgem.training.cli import answer, app; app.command('say')(lambda: answer(0, True, [])); app(['say'])"
    )
    command = ["sh", "-c", f'exec "$0" "$@" {streams}', sys.executable, "-c", script]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (code, "", said)


@pytest.mark.parametrize(
    "arguments",
    [
        ("index", "", "--model", "model", "--out", "out"),
        ("index", "images", "--model", "model", "--out", ""),
        ("caption", "", "--model", "model", "--out", "out"),
        ("search", "", "star"),
        ("verify", ""),
        ("train", ""),
        ("train", "recipe.yaml", "--out", ""),
        ("soup", "out", "", "model"),
        ("scenes", ""),
        ("demo", "--out", ""),
        ("search", "index"),
        ("search",),
        ("search", "index", "star", "--boxes", "1,2,3"),
        ("search", "index", "star", "--boxes", "a,b,c,d"),
        ("ask", "index", "what?"),
        ("ask", "index", "--image", "a.png", "--search", "star"),
        ("index", "images", "--model", "model", "--out", "out", "--vectors", "0"),
        ("index", "images", "--model", "model", "--out", "out", "--with-memory", "0"),
        ("index", "images", "--model", "model", "--out", "out", "--precision", "int4"),
        ("index", "images"),
        ("scenes", "out", "--count", "0"),
        ("paint",),
        ("train", "recipe.yaml", "--check", "--resume"),
    ],
)
def test_wrong_usage_has_exit_code_2(arguments):
    run(*arguments, exit_code=2)


def test_the_version_is_printed_and_the_package_is_a_command():
    expected = f"mmgem {mmgem.__version__}\n"
    assert run("--version").stdout == expected
    output = subprocess.run([sys.executable, "-m", "mmgem", "--version"], capture_output=True, text=True).stdout
    assert output == expected


@pytest.fixture
def index(checkpoint, gallery, tmp_path):
    run("index", gallery, "--model", checkpoint, "--out", tmp_path / "index")
    return tmp_path / "index"


def test_each_line_of_standard_input_is_a_query(index, gallery):
    pictures = sorted(gallery.glob("scene*.png"))[:2]
    alone = [json.loads(run("search", index, "--image", path, "--top", 2, "--json").stdout) for path in pictures]
    lines = "".join(f"{path}\n\n" for path in pictures)
    result = run("search", index, "--image", "-", "--top", 2, "--json", input=lines)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["query"] for answer in answers] == [str(path) for path in pictures]
    assert [answer["hits"] for answer in answers] == alone
    error = run("search", index, "-", input=b"\xff\n", exit_code=1).stderr
    assert "expected text without half a surrogate pair" in error
    blocks = run("search", index, "-", "--top", 1, input="a red star\ntwo moons\n").stdout.split("\n\n")
    assert [block.splitlines()[0] for block in blocks[:2]] == ["a red star", "two moons"]
    run("search", index, "-", "--image", "-", exit_code=2)


def test_a_demonstration_is_of_the_folder_the_model_and_the_words_given(checkpoint, gallery, tmp_path, monkeypatch):
    calls = []

    def run_demo(out, model, processor, *rest):
        calls.append((out, model.name_or_path, *rest))
        return out / "index.html", {}

    monkeypatch.setattr("mmgem.training.demo.run.run_demo", run_demo)
    words = ("--label", "a cat", "--label", "a dog", "--question", "what?")
    assert "index.html" in run("demo", gallery, "--out", tmp_path / "o", "--model", checkpoint, *words).stdout
    run("demo", "--out", tmp_path / "o", "--model", checkpoint, "--count", 12)
    given = (tmp_path / "o", str(checkpoint))
    assert calls == [(*given, 500, gallery, ["a cat", "a dog"], ["what?"], None), (*given, 12, None, (), (), None)]
    monkeypatch.setattr("mmgem.training.cli.PHOTO", checkpoint)
    run("demo", "--out", tmp_path / "o")
    assert calls[-1][1].endswith("mmgem-tiny") and calls[-1][-1][0].name_or_path == str(checkpoint)
    monkeypatch.setattr("mmgem.training.cli.PHOTO", tmp_path / "nowhere")
    run("demo", "--out", tmp_path / "o")
    assert calls[-1][1].endswith("mmgem-tiny") and calls[-1][-1] is None
    assert "give --model" in run("demo", gallery, exit_code=2).output


def test_what_is_found_is_explained_by_heat_maps(index, tmp_path):
    rows = json.loads(run("search", index, "a star", "--top", 2, "--explain", tmp_path / "why", "--json").stdout)
    files = sorted((tmp_path / "why").iterdir())
    assert [row["heat_map"] for row in rows] == [str(file) for file in files] and len(files) == 2
    for rank, (row, file) in enumerate(zip(rows, files, strict=True), 1):
        assert file.name == f"{rank:03}-{Path(row['path']).stem}.jpg"
        with Image.open(file) as heat_map, Image.open(row["path"]) as picture:
            assert heat_map.size == picture.size
    assert (
        "expected a new or an empty folder"
        in run("search", index, "x", "--explain", tmp_path / "why", exit_code=1).stderr
    )
    gone = Path(rows[0]["path"])
    gone.rename(gone.with_suffix(".away"))
    try:
        result = run("search", index, "a star", "--top", 2, "--explain", tmp_path / "one", "--json")
    finally:
        gone.with_suffix(".away").rename(gone)
    assert [row["heat_map"] is None for row in json.loads(result.stdout)] == [True, False]
    assert f"no heat map: `image` ('{gone}') is not there" in result.stderr and len(os.listdir(tmp_path / "one")) == 1
    run("search", index, "-", "--top", 1, "--explain", tmp_path / "each", input="a star\ntwo moons\n")
    assert [file.parent.name for file in sorted((tmp_path / "each").rglob("*.jpg"))] == ["0001", "0002"]


@pytest.mark.parametrize(
    ("ending", "read"),
    [
        ("csv", pandas.read_csv),
        ("parquet", pandas.read_parquet),
        ("jsonl", partial(pandas.read_json, lines=True, precise_float=True)),
    ],
)
def test_answers_are_kept_as_a_table(index, tmp_path, ending, read):
    file = tmp_path / f"hits.{ending}"
    hits = json.loads(run("search", index, "a red star", "--top", 3, "--table", file, "--json").stdout)
    expected = [{"query": "a red star", "rank": rank, **hit} for rank, hit in enumerate(hits, 1)]
    assert read(file).to_dict("records") == expected
    result = run("search", index, "a red star", "--table", tmp_path / "hits.xls", exit_code=1)
    assert "expected a file that ends in .csv, .parquet or .jsonl" in result.output


def test_quiet_says_the_answer_alone(checkpoint, gallery, tmp_path):
    (gallery / "empty.png").write_bytes(b"")
    result = run("--quiet", "index", gallery, "--model", checkpoint, "--out", tmp_path / "index")
    assert "left out" not in result.stderr and "images in" in result.stdout


@pytest.mark.slow
@pytest.mark.pages
def test_no_bars_move_in_a_pipe(index, gallery, checkpoint, tmp_path):
    command = [sys.executable, "-m", "mmgem", "caption", gallery, "--model", checkpoint, "--out", tmp_path / "c.jsonl"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0 and not re.search(r"\d+%|it/s", result.stderr), result.stderr
