"""Whatever saves or pushes a model leaves a folder that everything loads: each way of the one with each of the other.

All of it happens in processes without the package, but for what only the package does.
"""

import json
import tomllib
from pathlib import Path

import fresh_process
import hub_server
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_model

from mmgem.processing import save_sentence_transformer
from mmgem.sentence_transformers_files import REQUIREMENTS

PROMPTS = {"query": "find ", "edit": "the same, but "}

SAVE = """
import sys
from pathlib import Path
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

source, out = sys.argv[1:3]
trust = {"trust_remote_code": True}
model = AutoModel.from_pretrained(source, **trust)
processor = AutoProcessor.from_pretrained(source, **trust)
arguments = TrainingArguments(
    f"{out}/trainer", max_steps=1, report_to="none", use_cpu=True, hub_model_id="me/trainer", save_strategy="no"
)
trainer = Trainer(model, arguments, processing_class=processor)
captions = pipeline("image-to-text", model=source, **trust)
encoder, multi = SentenceTransformer(source, **trust), MultiVectorEncoder(source, **trust)
"""
SAVE_FOLDERS = """
model.save_pretrained(f"{out}/model_alone")
model.save_pretrained(f"{out}/model_first")
processor.save_pretrained(f"{out}/model_first")
processor.save_pretrained(f"{out}/processor_first")
AutoModelForImageTextToText.from_pretrained(source, **trust).save_pretrained(f"{out}/processor_first")
trainer.save_model(f"{out}/trainer")
captions.save_pretrained(f"{out}/captions")
encoder.save_pretrained(f"{out}/sentence_transformer")
multi.save(f"{out}/multi_vector")
MultiVectorEncoder(f"{out}/multi_vector", **trust).save_pretrained(f"{out}/multi_vector_again")
SentenceTransformer(f"{out}/multi_vector", **trust).save(f"{out}/single_after_multi")
"""
PUSH = """
model.push_to_hub("me/model")
processor.push_to_hub("me/both")
model.push_to_hub("me/both")
trainer.push_to_hub()
captions.push_to_hub("me/captions")
encoder.push_to_hub("me/sentence_transformer")
multi.push_to_hub("me/multi_vector")
"""
LOAD = """
import json, sys
import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, pipeline
from sentence_transformers import MultiVectorEncoder, SentenceTransformer

image, names = sys.argv[1], sys.argv[2:]
trust = {"trust_remote_code": True}
answers = {}
for name in names:
    model = AutoModel.from_pretrained(name, **trust)
    processor = AutoProcessor.from_pretrained(name, **trust)
    with torch.no_grad():
        inputs = processor(images=[image], text=["a red star"], return_tensors="pt")
        outputs = model(**inputs)
    encoder, multi = SentenceTransformer(name, **trust), MultiVectorEncoder(name, **trust)
    settings = {"do_sample": False, "max_new_tokens": 5}
    captions = pipeline("image-to-text", model=name, **trust)
    classify = pipeline("zero-shot-image-classification", model=name, **trust)
    answers[name] = {
        "AutoModel": [outputs.image_embeds.tolist(), outputs.text_embeds.tolist(), outputs.logits_per_image.tolist()],
        "SentenceTransformer": np.asarray(encoder.encode(["a red star", image])).tolist(),
        "MultiVectorEncoder": np.stack(multi.encode(["a red star", image])).tolist(),
        "meanmaxsim": np.asarray(multi.similarity(multi.encode(["a red star"]), multi.encode([image]))).tolist(),
        "prompts": [encoder.prompts, multi.prompts, multi.encode_query(["a star"])[0].tolist()],
        "modules": [type(module).__name__ for module in multi],
        "image-to-text": captions(image, generate_kwargs=settings),
        "zero-shot": [answer["score"] for answer in classify(image, candidate_labels=["red", "blue"])],
    }
print(json.dumps(answers))
"""
OPTIONS = """
import shutil, sys
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoProcessor

source, image, out = sys.argv[1:]
trust = {"trust_remote_code": True}
inputs = AutoProcessor.from_pretrained(source, **trust)(images=[image], text=["a red star"], return_tensors="pt")


@torch.no_grad()
def scores(model):
    return model.eval()(**inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}).logits_per_image.float()


model = AutoModel.from_pretrained(source, **trust)
expected = scores(model)
shutil.copytree(source, f"{out}/root/weights")
for code in Path(source).glob("*.py"):
    shutil.copy(code, f"{out}/root")  # where transformers looks for it
ways = {
    "device_map": (source, {"device_map": "cpu"}),
    "on disk": (source, {"device_map": "auto", "max_memory": {"cpu": "200KB"}, "offload_folder": f"{out}/disk"}),
    "subfolder": (f"{out}/root", {"subfolder": "weights"}),
    "attention": (source, {"attn_implementation": "eager", "low_cpu_mem_usage": True, "revision": "main"}),
}
found = {}
for name, (folder, options) in ways.items():
    loaded = AutoModel.from_pretrained(folder, **options, **trust)
    found[name] = (scores(loaded) - expected).abs().max().item()
    assert name != "on disk" or "disk" in loaded.hf_device_map.values()
half = AutoModel.from_pretrained(source, dtype="bfloat16", **trust)
assert half.dtype == torch.bfloat16
found["bfloat16"] = (scores(half) / expected - 1).abs().max().item() / 1000

tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
expected, before = scores(tuned), expected
assert (expected - before).abs().max() > 1e-3
tuned.save_pretrained(f"{out}/lora")
loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(source, **trust), f"{out}/lora")
found["LoRA"] = (scores(loaded) - expected).abs().max().item()
loaded.merge_and_unload().save_pretrained(f"{out}/merged")
found["merged"] = (scores(AutoModel.from_pretrained(f"{out}/merged", **trust)) - expected).abs().max().item()
print(found)
assert max(found.values()) < 1e-4, found
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("image") / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def source(tiny_processor, tmp_path_factory) -> str:
    """A folder of a model with several vectors and prompts."""
    folder = tmp_path_factory.mktemp("source")
    model = build_model(num_embedding_tokens=3, embedding_pooling="multi_vector", prompts=PROMPTS)
    save_sentence_transformer(model, tiny_processor, folder)
    return str(folder)


def load(image: str, names: list[str], cwd, connect: str) -> dict:
    output = fresh_process.run(connect + LOAD, image, *names, cwd=cwd, installed=False)
    return json.loads(output.splitlines()[-1])


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def different(folders: dict[str, dict[str, bytes]]) -> list[str]:
    """The names of folders whose files are not all the same, the last of each: what is the same loads as the same."""
    ignored = ("training_args.bin", ".gitattributes", "README.md")  # from which no model is loaded
    found = {
        tuple(sorted((file, content) for file, content in files.items() if Path(file).name not in ignored)): name
        for name, files in folders.items()
    }
    return list(found.values())


def check_equal(expected: dict, answers: dict):
    for name, by_loader in answers.items():
        for loader, answer in by_loader.items():
            assert_close(answer, expected[loader], f"{loader} of {name}")


def assert_close(actual, expected, where: str):
    if isinstance(expected, float):
        assert actual == pytest.approx(expected, abs=2e-5), where
    elif isinstance(expected, (list, dict)):
        assert type(actual) is type(expected) and len(actual) == len(expected), where
        pairs = zip(actual, expected) if isinstance(expected, list) else ((actual[k], expected[k]) for k in expected)
        for pair in pairs:
            assert_close(*pair, where)
    else:
        assert actual == expected, where


@pytest.mark.slow
def test_every_way_of_saving_and_pushing_with_every_way_of_loading(source, image, tmp_path):
    with hub_server.serve() as hub:
        code = hub.connect() + SAVE + SAVE_FOLDERS + PUSH
        fresh_process.run(code, source, tmp_path, cwd=tmp_path, installed=False)
        folders = sorted(str(folder) for folder in tmp_path.iterdir() if (folder / "config.json").exists())
        assert len(folders) == 9 and len(hub.repositories) == 6
        names = different({folder: contents(folder) for folder in folders} | hub.repositories)
        assert {*names} & {*hub.repositories}
        answers = load(image, [source, *names], tmp_path, hub.connect())
    expected = answers.pop(source)
    assert torch.tensor(expected["SentenceTransformer"]).shape == (2, 16)
    assert torch.tensor(expected["MultiVectorEncoder"]).shape == (2, 3, 16)
    check_equal(expected, answers)
    for folder in folders:
        settings = json.loads(Path(folder, "config_sentence_transformers.json").read_text())
        assert settings["requirements"].keys() == {"sentence-transformers", "torch", "transformers"}


@pytest.mark.pages
@pytest.mark.slow
def test_options_of_loading_and_peft_by_hand_change_nothing(source, image, tmp_path):
    fresh_process.run(OPTIONS, source, image, tmp_path, cwd=tmp_path, installed=False)


def test_the_folder_requires_what_the_package_does():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    assert {f"{name}{versions}" for name, versions in REQUIREMENTS.items()} <= set(required)
