"""The catalogue of `test_bad_input`, of commands and recipes: each is accepted with a result, or refused in one line
that names what is wrong, its value and what was expected."""

import copy
import functools
import json
import os
import re

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_models import build_model
from typer.testing import CliRunner

from mmgem.training import loading
from mmgem.training.cli import app
from mmgem.training.recipes.recipe import load_recipe
from mmgem.training.recipes.stage import eval_rows, open_sources, stage_arguments
from mmgem.training.recipes.validation import check_sections, check_stages

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_processor):
    """A folder with a `model`, `images`, their `index`, an `empty` folder, and a `file`; the current one."""
    folder = tmp_path_factory.mktemp("commands")
    build_model(prompts={"query": "find "}).save_pretrained(folder / "model")
    tiny_processor.save_pretrained(folder / "model")
    for name in ("images", "empty", "gallery/below"):
        (folder / name).mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"star {number}"}) for number in range(3)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "surrogate").mkdir()
    Image.fromarray(noise[0]).save(folder / "surrogate" / "0.png")
    (folder / "surrogate" / "metadata.jsonl").write_text(r'{"file_name": "0.png", "text": "\ud800"}')
    (folder / "file").write_text("hello")
    (folder / "broken.yaml").write_text("a: [")
    (folder / "list.yaml").write_text("[]")
    (folder / "captions.jsonl").write_text("not json\n")
    (folder / "flipped.jsonl").write_bytes(b'{"file_name": "0.png", "caption": "a \xf7"}\n')
    (folder / "deep.jsonl").write_text('{"file_name": "0.png", "caption": ' + "[" * 100_000 + "\n")
    (folder / "queries.jsonl").write_text('{"text": "star", "relevant": ["7.png"]}')
    (folder / "gallery" / "broken.png").write_bytes(b"no picture")
    (folder / "table.csv").mkdir()
    (folder / "loop").symlink_to("loop")
    before = os.getcwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_checkpoint", functools.cache(loading.load_checkpoint))
        assert CliRunner().invoke(app, ["index", "images", "--model", "model", "--out", "index"]).exit_code == 0
        yield folder
    os.chdir(before)


NO_MODEL = "`model` is '{}', neither a folder with a config.json nor a model on the Hub that can be reached"
TO_INDEX = ("--model", "model", "--out", "new")
SEARCH = ("search", "index")
PICTURE = "images/0.png"
COMMANDS = [
    (("nothing",), "No such command 'nothing'"),
    (("scenes", "file"), "`out` is 'file', which holds something; expected a new or empty folder"),
    (("scenes", "images"), "`out` is 'images', which holds something"),
    (("scenes", "file/new"), "`out` is '.*file/new', below a file; expected a path in a folder"),
    (("scenes", "new", "--count", "0"), "--count.*greater than or equal to 1"),
    (("scenes", "new", "--count", "many"), "--count.*valid integer"),
    (("scenes", "new", "--image-size", "1"), "`image_size` is 1; expected 48 to 2048 pixels"),
    (("scenes", "new", "--image-size", "10000000"), "`image_size` is 10000000; expected 48 to 2048 pixels"),
    (("demo", "--count", "3", "--out", "new"), "--count.*greater than or equal to 12"),
    (("demo", "--out", "images"), "`out` is 'images'.*expected"),
    (("demo", "--out", "new", "--model", "nothing"), NO_MODEL.format("nothing")),
    (("train", "nothing.yaml"), "recipe is 'nothing.yaml', which is not there; expected a YAML file"),
    (("train", "empty"), "recipe is 'empty', a folder; expected a YAML file"),
    (("train", "broken.yaml"), "recipe is 'broken.yaml'; expected YAML"),
    (("train", "list.yaml"), r"recipe is \[\]; expected a mapping with keys such as seed"),
    (("train", "file"), "recipe is 'hello'; expected a mapping"),
    (("train", PICTURE), "recipe is 'images/0.png'; expected YAML"),
    (("train", "list.yaml", "--check", "--resume"), "give --check or --resume, not both"),
    (("soup", "new"), "Missing argument"),
    (("soup", "new", "model"), r"`folders` is \['model'\]; expected two or more different ones"),
    (("soup", "new", "model", "model"), r"`folders` is \['model', 'model'\]; expected two or more different ones"),
    (("soup", "new", "model", "nothing"), "'nothing/config.json' is not there; expected the folder of a whole model"),
    (("soup", "new", "model", "file"), "'file/config.json' is not there"),
    (("soup", "new", "model", "empty", "--weight", "x"), "--weight.*valid number"),
    (("evaluate", "model", "nothing"), "`path` is 'nothing', where there is nothing; expected an image folder"),
    (("evaluate", "model", "file"), "`path` is 'file', a file; expected an image folder"),
    (("evaluate", "model", "empty"), "`path` is 'empty', where there are no images"),
    (("evaluate", "model", "table.csv"), "`path` is 'table.csv', where there are no images"),
    (("evaluate", "nothing", "images"), NO_MODEL.format("nothing")),
    (("evaluate", "images", "images"), NO_MODEL.format("images")),
    (("evaluate", "file", "images"), NO_MODEL.format("file")),
    (("evaluate", "", "images"), "`model` is ''; expected the folder of a checkpoint"),
    (("evaluate", "model", ""), "is empty; expected a path"),
    (("evaluate", "model", "images", "--batch-size", "0"), "--batch-size.*greater than or equal to 1"),
    (("evaluate", "model", "images", "--table", "x.txt"), "`--table` is 'x.txt'; expected a file that ends in .csv"),
    (("evaluate", "model", "images", "--table", "no/x.csv"), "`--table` is 'no/x.csv', in a folder that is not there"),
    (("evaluate", "model", "images", "--table", "table.csv"), "`--table` is 'table.csv', a folder; expected a file"),
    (("calibrate", "model", "images"), "Missing option '--out'"),
    (("calibrate", "model", "images", "--out", "file"), "`out` is 'file', which holds something"),
    (("calibrate", "model", "images", "--out", "model"), "`out` is 'model', which holds something"),
    (("calibrate", "model", "empty", "--out", "new"), "`path` is 'empty', where there are no images"),
    (("calibrate", "nothing", "images", "--out", "new"), NO_MODEL.format("nothing")),
    (("export", "model", "file", "--data", "images"), "`out` is 'file', a file; expected a folder"),
    (("export", "model", "images", "--data", "images"), "`out` is 'images', which holds something; expected a new or"),
    (("export", "nothing", "new", "--data", "images"), NO_MODEL.format("nothing")),
    (("export", "model", "new", "--data", "empty"), "`path` is 'empty', where there are no images"),
    (("push", "nothing", "a/b"), "`folder` is 'nothing', which is not there; expected that of a checkpoint"),
    (("push", "file", "a/b"), "`folder` is 'file', a file; expected that of a checkpoint"),
    (("push", "empty", "a/b"), "`folder` is 'empty', which lacks model.safetensors"),
    (("push", "model", "a/b"), "`folder` is 'model', which lacks README.md; expected a whole one"),
    (("index", "nothing", *TO_INDEX), "`folder` is 'nothing', which is not there; expected a folder of images"),
    (("index", "file", *TO_INDEX), "`folder` is 'file', a file; expected a folder of images"),
    (("index", PICTURE, *TO_INDEX), "`folder` is 'images/0.png', a file"),
    (("index", "empty", *TO_INDEX), "`folder` is 'empty', without images; expected files with .avif"),
    (("index", "gallery", *TO_INDEX), "where no image can be read, such as 'broken.png': the file holds 10 bytes"),
    (("index", "images", "--model", "nothing", "--out", "new"), NO_MODEL.format("nothing")),
    (("index", "images", "--model", "", "--out", "new"), "`model` is ''; expected the folder of a checkpoint"),
    (("index", "images", "--model", "model"), "Missing option '--out'"),
    (("index", "images", "--model", "model", "--out", "file"), "`out` is '.*file', which is no index"),
    (("index", "images", "--model", "model", "--out", "images"), "`out` is '.*images', which is no index"),
    (("index", "images", "--model", "model", "--out", "file/new"), "`out` is '.*file/new', below a file"),
    (("index", "images", "--model", "model", "--out", "index", "--dimensions", "4"), "dimensions 16; expected 4"),
    (("index", "empty", "--model", "model", "--out", "index", "--moved"), "`folder` is 'empty', without images"),
    (("index", "images", *TO_INDEX, "--dimensions", "999"), "`dimensions` is 999; expected 1 to 16"),
    (("index", "images", *TO_INDEX, "--dimensions", "0"), "--dimensions.*greater than or equal to 1"),
    (("index", "images", *TO_INDEX, "--vectors", "2"), "`vectors` is 2, but the model gives a single vector"),
    (("index", "images", *TO_INDEX, "--with-memory", "9"), "`memory` is 9; expected 1 to 1"),
    (("index", "images", *TO_INDEX, "--with-memory", "0"), "--with-memory is '0'; expected a number, 1 or more"),
    (("index", "images", *TO_INDEX, "--precision", "int4"), "--precision.*'int4' is not one of"),
    (("index", "images", *TO_INDEX, "--max-pixels", "0"), "--max-pixels.*greater than or equal to 1"),
    (("index", "images", *TO_INDEX, "--max-pixels", "9"), r"too large: 60 x 40 pixels; expected at most 9 in all"),
    (("index", "images", *TO_INDEX, "--batch-size", "0"), "--batch-size.*greater than or equal to 1"),
    (("index", "images", "--model", "model", "--out", "images/index"), None),
    (("search", "nothing", "star"), "`path` is 'nothing', which is not there; expected an index"),
    (("search", "file", "star"), "`path` is 'file', which is no index; expected a folder with search_index.json"),
    (("search", "empty", "star"), "`path` is 'empty', which is no index"),
    (("search", "model", "star"), "`path` is 'model', which is no index"),
    ((*SEARCH,), "give TEXT, --image, or both"),
    ((*SEARCH, "--where", "width>0", "--hybrid"), "--lexical-weight says something of a query; give TEXT or --image"),
    ((*SEARCH, "--kind", "image", "--prompt", "query"), "--prompt says something of a query; give TEXT or --image"),
    ((*SEARCH, ""), "`text` is ''; expected something to look for"),
    ((*SEARCH, "   "), "`text` is ' '; expected something to look for"),
    ((*SEARCH, "star", "--top", "0"), "--top.*greater than or equal to 1"),
    ((*SEARCH, "star", "--top", "99999"), None),
    ((*SEARCH, "star", "--vectors", "2"), "`vectors` is 2, but the index has a single vector"),
    ((*SEARCH, "star", "--query-vectors", "2"), "`query_vectors` is 2, but the index has a single vector"),
    ((*SEARCH, "star", "--prompt", "nothing"), "`prompt` is 'nothing'; expected one of 'query'"),
    ((*SEARCH, "star", "--prompt", ""), "`prompt` is ''; expected one of 'query'"),
    ((*SEARCH, "star", "--prompt", "query"), None),
    ((*SEARCH, "--image", PICTURE, "--prompt", "query"), "`prompt` is 'query', but there is no `text`"),
    ((*SEARCH, "--image", "nothing.png"), r"`image` \('nothing.png'\) is not there"),
    ((*SEARCH, "--image", ""), r"`image` \(''\)"),
    ((*SEARCH, "--image", "file"), r"`image` \('file'\) holds 5 bytes that are no image"),
    ((*SEARCH, "--image", "empty"), r"`image` \('empty'\) cannot be read: it is no regular file"),
    ((*SEARCH, "--image", "http://127.0.0.1/a.png"), "is a URL, and fetching is off"),
    ((*SEARCH, "--image", "-", "-"), "- stands for TEXT or for --image; give it once"),
    ((*SEARCH, "star", "--boxes", "0,0,9,9"), "`boxes` is given, but `image` is None"),
    ((*SEARCH, "--image", PICTURE, "--boxes", "1,2,3"), "--boxes is '1,2,3'; expected four numbers"),
    ((*SEARCH, "--image", PICTURE, "--boxes", "0,0,0,0"), r"`boxes\[0\]\[0\]` is \[0.0, 0.0, 0.0, 0.0\]; expected"),
    ((*SEARCH, "--image", PICTURE, "--boxes", "nan,0,9,9"), "expected finite pixel coordinates"),
    ((*SEARCH, "--image", PICTURE, "--boxes", "0,0,9,9", "--boxes", "1,1,9,9"), "`boxes` holds 2 boxes, without a `t"),
    ((*SEARCH, "--image", PICTURE, "--image", PICTURE), "`image` holds 2 images, without a `text`"),
    ((*SEARCH, "star", "--image", PICTURE, "--image", PICTURE), None),
    ((*SEARCH, "star", "--model", "nothing"), NO_MODEL.format("nothing")),
    ((*SEARCH, "star", "--model", ""), "`model` is ''; expected the folder of a checkpoint"),
    ((*SEARCH, "star", "--table", "x.xml"), "`--table` is 'x.xml'; expected a file that ends in"),
    ((*SEARCH, "star", "--table", "no/x.csv"), "`--table` is 'no/x.csv', in a folder that is not there"),
    *[((*SEARCH, "star", "--where", where), outcome) for where, outcome in [
        ("", "`where` is ''; expected NAME, one of = "), ("width", "`where` is 'width'; expected NAME"),
        ("=60", "`where` is '=60'; expected NAME"), ("width==60", "`where` is 'width==60'; expected NAME"),
        ("width<nan", "`where` is 'width<nan'; expected a finite number, or a word, after <"),
        ("width>=1e999", "expected a finite number"), ("nothing=1", "`where` names 'nothing', which no row has; exp"),
        ("width=60", None),
    ]],
    ((*SEARCH, "star", "--kind", "nothing"), "`kinds` holds 'nothing', of which the index has none; expected some of"),
    ((*SEARCH, "--image", PICTURE, "--hybrid"), "`lexical_weight` is 0.5, but there is no `text`"),
    ((*SEARCH, "star", "--lexical-weight", "2"), "--lexical-weight.*less than or equal to 1"),
    ((*SEARCH, "star", "--explain", "images"), "`--explain` is 'images', which is there; expected a new or an empty"),
    ((*SEARCH, "--fit-on", "nothing"), "`--fit-on` is 'nothing', which is no file; expected one of JSON lines"),
    ((*SEARCH, "--fit-on", "images"), "`--fit-on` is 'images', which is no file"),
    ((*SEARCH, "--fit-on", PICTURE), "images/0.png ends in '.png'; expected one of .csv, .jsonl, .parquet"),
    ((*SEARCH, "--fit-on", "captions.jsonl"), "line 1 of captions.jsonl is no JSON object; expected one"),
    ((*SEARCH, "--fit-on", "images/metadata.jsonl"), "expected `text`, and `relevant`, a list of files"),
    ((*SEARCH, "--fit-on", "queries.jsonl"), r"'star' with the relevant files \['7.png'\]; expected some of the inde"),
    (("ask", "index", "what?"), "give --image or --search, one of them"),
    (("ask", "index", "what?", "--search", ""), "`text` is ''; expected something to look for"),
    (("ask", "index", "what?", "--image", "nothing.png"), "`images` holds 'nothing.png', which is not in the index"),
    (("ask", "index", "what?", "--image", "0.png"), "has no memory; expected one that was made `--with-memory`"),
    (("ask", "index", "what?", "--image", "0.png", "--top", "1"), "with --image it has nothing to say"),
    (("ask", "nothing", "--search", "star"), "`path` is 'nothing', which is not there"),
    ((*SEARCH, "star", "--table", "index/rows-1.parquet"), "`--table` is 'index/rows-1.parquet', which belongs to a"),
    ((*SEARCH, "star", "--table", "images/metadata.jsonl"), "`--table` is 'images/metadata.jsonl', which belongs to"),
    ((*SEARCH, "\ud800"), r"`text\[0\]` is .*ud800.*; expected text without half a surrogate pair"),
    ((*SEARCH, "--image", "/dev/zero"), "no regular file"),
    ((*SEARCH, "--image", "loop"), r"`image` \('loop'\)"),
    ((*SEARCH, "star", "--top", str(10**20)), None),
    (("index", "images", "--model", "model", "--out", "index/unfinished"), "where an index keeps what is unfinished"),
    (("index", "images", "--model", "model", "--out", "loop"), "`out` is 'loop', a link that leads back to itself"),
    (("caption", "images", "--model", "model", "--out", "loop"), "`out` is 'loop', a link that leads back to itself"),
    (("caption", "images", "--model", "model", "--out", "/dev/null"), "`out` is '/dev/null', no regular file; expect"),
    (("scenes", "/proc/x"), "`out` is '/proc/x', beside which its lock, 'x.lock', cannot be written"),
    (("scenes", "x" * 253), "beside which its lock, 'x{253}.lock', cannot be written .File name too long.; expected"),
    (("scenes", "/"), "`out` is '/', where no lock can be beside it; expected a path below it"),
    (("evaluate", "model", "images", "--table", "/proc/x.csv"), "`--table` is '/proc/x.csv', which cannot be written"),
    (("evaluate", "\udce9", "images"), "`model` is '.udce9', a name that is not UTF-8; expected one that is"),
    (("train", "/dev/zero"), "recipe is '/dev/zero', no regular file; expected a YAML file"),
    (("scenes", "loop"), "`out` is 'loop', a link that leads back to itself"),
    (("serve", "model", "--host", ""), "`host` is ''; expected an address, such as 127.0.0.1"),
    (("serve", "model", "--port", "70000"), "--port.*less than or equal to 65535"),
    (("demo", "images", "--model", "model", "--out", "new", "--label", ""), r"`labels` is \[''\]; expected texts"),
    (("demo", "images", "--model", "model", "--out", "new", "--question", " "), r"`questions` is \[' '\]; expected"),
    (("demo", "images", "--model", "model", "--out", "."), "`folder` is 'images', in `out`, which is replaced"),
    (("evaluate", "model", "surrogate"), "`dataset` has . rows that can be read"),
    (("verify", "nothing"), "`index` is 'nothing', which is no index"),
    (("verify", "file"), "`index` is 'file', which is no index"),
    (("verify", "images"), "`index` is 'images', which is no index"),
    (("verify", "index"), None),
    (("caption", "nothing", *TO_INDEX), "`folder` is 'nothing', which is not there"),
    (("caption", "empty", *TO_INDEX), "`folder` is 'empty', without images"),
    (("caption", "gallery", *TO_INDEX), "where no image can be read, such as 'broken.png': the file holds 10 bytes"),
    (("caption", "images", "--model", "model", "--out", "empty"), "`out` is 'empty', a folder; expected a file"),
    (("caption", "images", "--model", "model", "--out", "captions.jsonl"), "whose line 1 is 'not json'; expected"),
    (("caption", "images", "--model", "model", "--out", "flipped.jsonl"), "whose line 1 is .*; expected captions of"),
    (("caption", "images", "--model", "model", "--out", "deep.jsonl"), "whose line 1 is .*; expected captions of"),
    (("caption", "images", "--model", "model", "--out", "file/new"), "`out` is '.*file/new', below a file"),
    (("caption", "images", "--model", "nothing", "--out", "new"), NO_MODEL.format("nothing")),
    (("caption", "images", *TO_INDEX, "--boxes"), "captions of boxes are asked for, but no line of .* has any"),
]  # fmt: skip


def name_of(row) -> str:
    return "-".join(map(str, row[0])) if isinstance(row[0], tuple) else f"{row[0]}-{row[1]!r:.60}"


@pytest.mark.parametrize("row", COMMANDS, ids=name_of)
def test_a_command_answers_or_says_in_a_line_what_is_wrong(place, row):
    arguments, outcome = row
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, [*arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    if outcome is None:
        assert result.exit_code == 0 and result.stdout
        return
    assert result.exit_code in (1, 2) and not result.stdout
    said = " ".join(result.stderr.replace("│", " ").split())
    assert re.search(outcome, said), said
    assert not (place / "new").exists()


SCENES = {"scenes": {"seed": 1, "count": 8}}
FOLDER = {"folder": "images"}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 32, "num_hidden_layers": 1}
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}
RECIPE = {
    "model": {"vision_config": SIGLIP, "text_config": LLAMA, "projection_dim": 8},
    "image_processor": {"size": {"height": 32, "width": 32}},
    "tokenizer": {"vocab_size": 300, "model_max_length": 400},
    "prompts": {"query": "Find "},
    "generation": {"num_beams": 3},
    "eval_data": SCENES,
    "stages": [
        {
            "name": "first",
            "train_data": SCENES,
            "collator": {"captions_per_image": 2},
            "objective": {},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True},
        }
    ],
}
STAGE, TRAINING, DATA = ("stages", 0), ("stages", 0, "training"), ("stages", 0, "train_data")
RECIPES = [
    (("seed",), "one", "`seed` is 'one'; expected int"),
    (("seed",), 1.5, "`seed` is 1.5; expected int"),
    (("seed",), True, "`seed` is True; expected int"),
    (("seed",), -1, "`seed` is -1; expected 0 to 4294967295"),
    (("seed",), 2**70, "1180591620717411303424 is beyond the numbers of 64 bits"),
    (("nothing",), 1, "recipe has the unknown key `nothing`"),
    (("stage",), [], "unknown key `stage`.*Did you mean `stages`"),
    (("model",), [], "recipe has no section `model`"),
    (("model",), {"pretrained": 3}, "`pretrained` in `model` is 3; expected str"),
    (("model",), {"vision": "a"}, "`model` has no `text`; expected"),
    (("model", "projection_dim"), 0, "`projection_dim` is 0; expected"),
    (("model", "projection_dim"), "wide", "projection_dim"),
    (("model", "dtype"), "int8", "`dtype` in `model` is 'int8'; expected"),
    (("model", "num_visual_tokens"), 3, "`num_visual_tokens` is 3; expected a square"),
    (("model", "hidden_layers"), 3, "`model` has the unknown key `hidden_layers`"),
    (("model", "vision_config"), {}, "`vision_config` in `model` is {}; expected a mapping with a `model_type`"),
    (("model", "vision_config"), {"model_type": "nothing"}, "`model_type` of .* is 'nothing'; expected one such as"),
    (("model", "vision_config"), {"model_type": "siglip"}, "vision"),
    (("model", "vision_config"), {"model_type": ["siglip"]}, "expected a mapping with a `model_type`"),
    (("model", "vision_config"), SIGLIP | {"image_size": []}, "`model` cannot be built: "),
    (("model", "projection_dim"), 2**63 - 1, "`model` cannot be built: "),
    (("model", "vision_config"), SIGLIP | {"image_size": -1}, "`image_size` of SiglipVisionConfig is -1; expected 0"),
    (("model", "vision_config"), SIGLIP | {"patch_size": 0}, "`model` cannot be built: .*zero"),
    (("model", "vision_config"), SIGLIP | {"image_size": "x"}, "'image_size'"),
    (("model", "vision_config"), LLAMA, "`vision` is a `llama`, which takes .*; expected an encoder of images"),
    (("model", "text_config"), LLAMA | {"hidden_size": 65}, "65.* not a multiple"),
    (("model", "text_config"), LLAMA | {"hidden_sizes": 64}, "unknown key `hidden_sizes`"),
    (("image_processor",), None, "`image_processor` is None; expected a mapping"),
    (("image_processor",), {"sizes": 3}, "`image_processor` has the unknown key `sizes`"),
    (("image_processor",), {"size": "large"}, "`image_processor` is {'size': 'large'}, with which no picture can be"),
    (("image_processor",), {"size": {"height": 0, "width": 0}}, "with which no picture can be processed"),
    (("image_processor",), {"size": {"height": 10**5, "width": 10**5}}, "expected at most 268,435,456 pixels"),
    (("image_processor",), {"image_std": [0, 0, 0]}, "which makes pixels that are NaN or infinite"),
    (("image_processor",), {"image_mean": "grey"}, "with which no picture can be processed"),
    (("tokenizer",), {"vocab_size": 300}, "`tokenizer` has no `model_max_length`; expected a value"),
    (("tokenizer",), {"vocab_size": "many", "model_max_length": 3}, "`vocab_size` in `tokenizer` is 'many'; expected"),
    (("prompts",), {"query": 3}, "`prompts` is {'query': 3}; expected"),
    (("prompts",), {"query": "\ud800"}, "expected YAML: '.ud800' has half a surrogate pair"),
    (("prompts",), ["query"], r"`prompts` is \['query'\]; expected"),
    (("generation",), {"num_beams": 0}, "`num_beams` is 0; expected a whole number of at least 1"),
    (("generation",), {"num_return_sequences": 0}, "`num_return_sequences` is 0; expected"),
    (("generation",), {"max_new_tokens": 1.5}, "`max_new_tokens` is 1.5; expected"),
    (("generation",), {"do_sample": "yes"}, "`do_sample` is 'yes'; expected True or False"),
    (("generation",), {"top_p": 3.0}, "`top_p` is 3.0; expected a number from 0 to 1"),
    (("generation",), {"eos_token_id": -9}, "`eos_token_id` is -9; expected token ids"),
    (("generation",), {"length_penalty": NAN}, "`length_penalty` is nan; expected a finite number"),
    (("generation",), {"image_similarity_weight": 1.0}, "`num_beams` is 1; expected more beside"),
    (("generation",), {"image_similarity_weight": -1.0, "num_beams": 2}, "`image_similarity_weight` is -1.0;"),
    (("generation",), {"beams": 2}, "`generation` has the unknown key `beams`"),
    (("eval_data",), {}, "`eval_data` is {}; expected one of scenes, folder"),
    (("eval_data",), {"scenes": {"seed": 1, "count": 1}}, "`eval_data` has 1 row; expected 2 or more"),
    (("eval_data",), {"scenes": {"seed": 1, "count": -1}}, "`count` is -1; expected 1 or more"),
    (("eval_data",), "images", "`eval_data` is 'images'; expected a mapping"),
    (("eval_data",), {"folder": ""}, "`folder` in `eval_data` is ''; expected where the data are"),
    (("eval_data",), {"folder": 3}, "`folder` in `eval_data` is 3; expected str"),
    (("eval_data",), FOLDER | SCENES, "expected one of scenes, folder"),
    (("eval_data",), FOLDER | {"weight": NAN}, "`weight` in `eval_data` is nan; expected 0 or more"),
    (("eval_data",), FOLDER | {"columns": {"nothing": "a"}}, "`columns` in `eval_data` has the unknown key `nothing`"),
    (("eval_data",), FOLDER | {"columns": {"captions": 3}}, "expected dict"),
    (("eval_data",), FOLDER | {"allow_urls": "yes"}, "`allow_urls` in `eval_data` is 'yes'; expected"),
    (("eval_data",), FOLDER | {"prompt_name": 3}, "`prompt_name` in `eval_data` is 3; expected"),
    (("eval_data",), {"scenes": {"seed": 1}}, "`scenes` in `eval_data` has no `count`; expected a value"),
    (("stages",), [], "recipe has no section `stages`"),
    (("stages",), [3], "stage 1 is 3; expected a mapping"),
    (("stages",), RECIPE["stages"] * 2, "`stages` are called first, first; expected a name of its own"),
    *[
        (("stages",), [RECIPE["stages"][0], RECIPE["stages"][0] | {"name": name}], f"are called first, {name}; expect")
        for name in ("First", "\uff46irst")  # one folder, on some systems
    ],
    *[
        ((*STAGE, "name"), name, "expected a name for a folder")
        for name in ("NUL", "com1.x", "a.", "first.partial", "\u5b57" * 90)
    ],
    ((*STAGE, "name"), "", "`name` of stage 1 is ''; expected a name for a folder"),
    ((*STAGE, "name"), "../up", "`name` of stage 1 is '../up'; expected a name for a folder"),
    ((*STAGE, "name"), "a\n", "expected a name for a folder"),
    ((*STAGE, "name"), "x" * 300, "expected a name for a folder"),
    ((*STAGE, "nothing"), 1, "stage 1 has the unknown key `nothing`"),
    ((*STAGE, "image_size"), 0, "`image_size` of stage `first` is 0; expected 1 to 16384 pixels"),
    ((*STAGE, "image_size"), 1 << 15, "`image_size` of stage `first` is 32768; expected 1 to 16384 pixels"),
    ((*STAGE, "image_size"), 33, "image_size"),
    ((*STAGE, "text_attention"), "none", "`text_attention` of stage `first` is 'none'; expected"),
    ((*STAGE, "embedding"), {"num_embedding_tokens": 0}, "`num_embedding_tokens`|`embedding_pooling`"),
    ((*STAGE, "embedding"), {"num_embedding_tokens": 2, "embedding_pooling": "best"}, "embedding_pooling"),
    ((*STAGE, "cache_features"), "yes", "`cache_features` of stage `first` is 'yes'; expected a mapping"),
    ((*STAGE, "cache_features"), {"views": 0}, "is 0; expected 1 or more"),
    ((*STAGE, "cache_features"), {"views": 3}, "has 3 `views`, and the `collator` has no `augmentation`"),
    ((*STAGE, "cache_features"), True, "`vision_tower.* trains; expected `freeze"),
    ((*STAGE, "cache_features"), {"texts": 1}, "`texts` in `cache_features` of stage `first` is 1; expected bool"),
    ((*STAGE, "cache_features"), {"texts": True}, "language model learns to write; expected `caption_loss_weight: 0`"),
    ((*STAGE, "objective"), {"fusemix": 1.0}, "`fusemix` in `objective` of stage `first` is 1.0, without features of"),
    ((*STAGE, "objective"), {"fusemix": 0}, "`fusemix` is 0; expected a number above 0"),
    ((*STAGE, "objective"), {"structure": -1}, "`structure` is -1"),
    ((*STAGE, "reconstruction"), {}, "exclude each other; expected one of them"),
    ((*STAGE, "objective"), {"nothing": 1}, "`objective` of stage `first`.*nothing"),
    ((*STAGE, "objective"), {"hardness": -1}, "`objective` of stage `first`: `hardness` is -1"),
    ((*STAGE, "objective"), {"hardness": NAN}, "`hardness` is nan"),
    (DATA, [], "`train_data` of stage `first` is an empty list; expected at least one source"),
    (DATA, [SCENES | {"weight": 0}], "`weight` of all `train_data` of stage `first` is 0; expected one above it"),
    (DATA, SCENES | {"weight": -1}, "`weight` in `train_data` of stage `first` is -1; expected 0 or more"),
    (DATA, {"scenes": {"seed": 1, "count": 0}}, "`count` is 0; expected 1 or more"),
    (DATA, {"scenes": {"seed": 1, "count": 8, "image_size": 10**9}}, "expected 48 to 2048 pixels"),
    (DATA, {"folder": "nothing"}, "`path` is 'nothing', where there is nothing"),
    (DATA, {"folder": "file"}, "`path` is 'file', a file; expected an image folder"),
    (DATA, FOLDER | {"columns": {"captions": "title"}}, "has no column `title`"),
    (DATA, FOLDER | {"prompt_name": "nothing"}, "`prompt_name` of `train_data` is 'nothing'; expected one of query"),
    (DATA, {"parquet": "nothing-*.parquet"}, "nothing"),
    (DATA, {"webdataset": "nothing-*.tar"}, "nothing"),
    (DATA, FOLDER | {"subset": [0.5, 0.5]}, r"`subset` is \[0.5, 0.5\]; expected two rising numbers from 0 to 1"),
    (DATA, FOLDER | {"subset": "half"}, "`subset` in `train_data` of stage `first` is 'half'; expected"),
    (DATA, FOLDER, None),
    ((*STAGE, "collator"), {"captions": 1}, "`collator` of stage `first` has the unknown key `captions`"),
    ((*STAGE, "collator"), {"captions_per_image": -1}, "`collator` of stage `first`: `captions_per_image` is -1"),
    ((*STAGE, "collator"), {"captions_per_image": "all"}, "`captions_per_image` in `collator` of .* is 'all'"),
    ((*STAGE, "collator"), {"long_caption_probability": 2}, "`long_caption_probability` is 2; expected a number from"),
    ((*STAGE, "collator"), {"label_template": "a picture"}, "`label_template` is 'a picture'; expected a text with"),
    ((*STAGE, "collator"), {"label_template": "{label"}, "`label_template` is '{label'; expected"),
    ((*STAGE, "collator"), {"augmentation": {"min_crop": 2}}, "`min_crop` is 2; expected a share above 0, up to 1"),
    ((*STAGE, "collator"), {"augmentation": {"crop": 1}}, "has the unknown key `crop`"),
    ((*STAGE, "collator"), {"augmentation": {"color_jitter": NAN}}, "`color_jitter` is nan; expected"),
    ((*STAGE, "collator"), {"augmentation": {"min_crop": 1}}, None),
    (TRAINING, [], r"`training` of stage `first` is \[\]; expected a mapping"),
    *[((*TRAINING, name), value, f"`{name}`.* is {value!r}; expected") for name, value in [
        ("max_steps", 0), ("max_steps", -2), ("max_steps", 2.5), ("max_steps", "ten"), ("learning_rate", -1.0),
        ("learning_rate", NAN), ("learning_rate", INF), ("learning_rate", "fast"), ("weight_decay", -1.0),
        ("weight_decay", NAN), ("max_grad_norm", -1.0), ("max_grad_norm", NAN), ("adam_beta1", 2.0),
        ("adam_epsilon", -1.0), ("warmup_steps", -5), ("save_steps", 0), ("save_steps", -1), ("logging_steps", -1),
        ("per_device_train_batch_size", 0), ("per_device_eval_batch_size", -2), ("gradient_accumulation_steps", 0),
        ("dataloader_num_workers", -1), ("dataloader_num_workers", 10**6), ("ema_decay", 2.0),
        ("caption_loss_weight", -1.0), ("seed", -1),
        ("neftune_noise_alpha", NAN), ("neftune_noise_alpha", -1.0), ("eval_accumulation_steps", 0),
        ("ddp_timeout", 0), ("per_device_train_batch_size", 10**12), ("per_device_eval_batch_size", 10**12),
        ("bf16", "perhaps"), ("lora", 3), ("freeze", "vision_tower"), ("grad_cache_chunk_size", 0),
    ]],
    ((*TRAINING, "save_steps"), INF, "`training` of stage `first`: cannot convert float infinity"),
    ((*TRAINING, "steps"), 3, "`training` of stage `first` has the unknown key `steps`"),
    ((*TRAINING, "output_dir"), "x", "has the unknown key `output_dir`"),
    ((*TRAINING, "optim"), "best", "`training` of stage `first`: best is not a valid"),
    ((*TRAINING, "lr_scheduler_type"), "best", "`training` of stage `first`: best is not a valid"),
    ((*TRAINING, "freeze"), ["nothing"], "`freeze` has the unknown key `nothing`; expected embedding_tokens"),
    ((*TRAINING, "train_only"), [], r"`train_only` is \[\], which leaves nothing to train"),
    ((*TRAINING, "learning_rates"), {"vision_tower": -1}, "`vision_tower` in `learning_rates` of .* is -1; expec"),
    ((*TRAINING, "learning_rates"), {"vision_tower": NAN}, "is nan; expected 0 or more"),
    ((*TRAINING, "lora"), {"r": 0}, "`r` in `lora` of stage `first` is 0; expected 1 or more"),
    ((*TRAINING, "lora"), {"r": 10**9}, "`r` in `lora` of stage `first` is 1000000000; expected 1 or more, up to"),
    ((*TRAINING, "lora"), {"rank": 4}, "`lora` of stage `first` has the unknown key `rank`"),
    ((), RECIPE, None),
]  # fmt: skip


def check(file):
    """All that `mmgem train` checks before it loads weights or trains a step."""
    recipe = load_recipe(file)
    check_sections(recipe)
    check_stages(recipe)
    eval_rows(recipe)
    for stage in recipe.stages:
        stage_arguments(recipe, stage, file.parent / "runs")
        open_sources(stage)


def refused_or_taken(file, outcome):
    if outcome is None:
        check(file)
        return
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        check(file)
    assert re.search(outcome, str(error.value)), error.value


@pytest.mark.parametrize("row", RECIPES, ids=name_of)
def test_a_recipe_is_refused_before_anything_is_trained(place, tmp_path, row):
    path, value, outcome = row
    recipe = copy.deepcopy(RECIPE)
    section = recipe
    for key in path[:-1]:
        section = section[key]
    if path:
        section[path[-1]] = value
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    refused_or_taken(file, outcome)


@pytest.mark.parametrize(
    "text, outcome",
    [
        ("", "recipe is None; expected a mapping"),
        ("seed: 1\nseed: 2", "expected YAML: the key 'seed' is there twice"),
        ("seed: 010", "expected YAML: 010 would be 8, to base 60 or 8; expected digits without"),
        ("seed: 1:30", "expected YAML: 1:30 would be 90, to base 60 or 8; expected digits without"),
        ("[" * 3000, "nested too deeply; expected YAML"),
        ("!!python/object:os.system {}", "expected YAML: could not determine a constructor"),
        ("&a [*a]", "its aliases repeat themselves"),
        ("a: &a {b: *a}", "its aliases repeat themselves"),
        (
            "a0: &a0 {b: 1}\n"
            + "\n".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)),
            "or make more than 100,000 values",
        ),
        ('prompts: {query: "\\ud83d\\ude00"}\nseeds: 1', "unknown key `seeds`"),
        ("\tseed: 1", "expected YAML"),
        ("\ufeffseed: 1\r\nseeds: 1", "unknown key `seeds`"),
        ("? [a]\n: b", "expected YAML"),
        ("seed: 2026-99-99", "expected YAML"),
        ("\0", "expected YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, outcome):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    refused_or_taken(file, outcome)
