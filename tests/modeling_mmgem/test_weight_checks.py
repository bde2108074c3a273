"""A checkpoint whose weights or configuration are damaged is refused, by whatever loads it, and never filled up."""

import json
import math
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from transformers import AutoModel, AutoProcessor, pipeline

from mmgem import (  # from the package itself, which registers them
    MMGEMConfig,
    MMGEMModel,
    MMGEMProcessor,
    weight_checks,
)
from mmgem.training.loading import load_checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    build_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def change_weights(folder, **changes):
    weights = load_file(folder / WEIGHTS) | changes
    save_file({k: v for k, v in weights.items() if v is not None}, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder, path, value):
    config = json.loads((folder / "config.json").read_text())
    *parents, name = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    place[name] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_projection.weight": None}, "lacks the weights text_projection.weight of a `mmgem`; expected"),
        ({"embedding_tokens": None, "logit_scale": None}, "lacks the weights embedding_tokens, logit_scale of"),
        (
            {"language_model.model.embed_tokens.weight": None},
            "lacks the weights language_model.lm_head.weight, language_model.model.embed_tokens.weight of",
        ),
        ({"further.weight": torch.zeros(2)}, "has beyond it the weights further.weight of"),
        ({"logit_scale": torch.zeros(2)}, "has, in another shape, the weights logit_scale of"),
        ({"logit_scale": torch.tensor([torch.nan])}, "has, not finite, the weights logit_scale of"),
        ({"logit_scale": torch.tensor([-torch.inf])}, "has, not finite, the weights logit_scale of"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, changes, message):
    change_weights(folder, **changes)
    for model_class in (MMGEMModel, AutoModel):
        with pytest.raises(ValueError, match=re.escape(f"`model` is {str(folder)!r}, which {message}")):
            model_class.from_pretrained(folder, trust_remote_code=False)


def test_a_pipeline_does_not_fill_up_weights_either(folder, tiny_processor):
    tiny_processor.save_pretrained(folder)
    change_weights(folder, embedding_tokens=None)
    with pytest.raises(ValueError, match="lacks the weights embedding_tokens"):
        pipeline("image-feature-extraction", model=str(folder), trust_remote_code=True)


def test_many_missing_weights_are_counted(folder):
    names = [name for name in load_file(folder / WEIGHTS) if name.startswith("vision_tower.encoder.layers.1")]
    change_weights(folder, **dict.fromkeys(names))
    with pytest.raises(ValueError, match=rf"vision_tower\.encoder\.layers\.1\S+ and {len(names) - 3} more of a"):
        MMGEMModel.from_pretrained(folder)


def test_the_report_can_be_asked_for_instead(folder):
    change_weights(folder, embedding_tokens=None)
    model, report = MMGEMModel.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {"embedding_tokens"}
    assert model.embedding_tokens.isfinite().all()


def test_another_shape_can_be_asked_for(folder):
    loaded = MMGEMModel.from_pretrained(folder, projection_dim=8, ignore_mismatched_sizes=True)
    assert loaded.text_projection.weight.shape == (8, 32)
    with pytest.raises(ValueError, match="in another shape, the weights image_projection.1.weight, text_projection"):
        MMGEMModel.from_pretrained(folder, projection_dim=8)


def test_tied_weights_may_be_stored_under_either_name_or_both(folder):
    words = load_file(folder / WEIGHTS)["language_model.model.embed_tokens.weight"]
    change_weights(folder, **{"language_model.lm_head.weight": words.clone()})
    assert torch.equal(MMGEMModel.from_pretrained(folder).get_input_embeddings().weight, words)
    change_weights(folder, **{"language_model.model.embed_tokens.weight": None})
    assert torch.equal(MMGEMModel.from_pretrained(folder).get_input_embeddings().weight, words)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_of_weights_are_whole(folder, dtype):
    assert MMGEMModel.from_pretrained(folder, dtype=dtype).dtype == dtype


@pytest.mark.parametrize("length", [0, 5, 100, 20_000, -1])
def test_a_file_of_weights_that_is_cut_short(folder, length):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
    with pytest.raises(ValueError, match=f"`model` is {str(folder)!r}, which cannot be read .*; expected a whole"):
        MMGEMModel.from_pretrained(folder)


def test_no_bit_of_the_header_can_flip_silently(folder, whole):
    content = (whole / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for place in range(0, 8 + length, length // 4):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match="which (cannot be read|lacks the weights)"):
            MMGEMModel.from_pretrained(folder)


def damaged_index(index):
    first = next(iter(index["weight_map"].values()))
    kept = {name: file for name, file in index["weight_map"].items() if file != first}
    yield {**index, "weight_map": kept}, "`config` asks for|lacks the weights"
    yield {**index, "weight_map": {}}, "cannot be read"
    yield {**index, "weight_map": list(kept)}, "cannot be read"
    yield {"metadata": {}}, "cannot be read"


def test_the_index_of_shards(tmp_path):
    build_model().save_pretrained(tmp_path, max_shard_size="50KB")
    for index, message in damaged_index(json.loads((tmp_path / INDEX).read_text())):
        (tmp_path / INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            MMGEMModel.from_pretrained(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index)[:-3])
    with pytest.raises(ValueError, match=r"cannot be read \(JSONDecodeError"):
        MMGEMModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.num_hidden_layers", 1, "has beyond it the weights language_model.model.layers.1"),
        ("text_config.num_hidden_layers", 3, "lacks the weights language_model.model.layers.2"),
        ("text_config.num_hidden_layers", 20, "asks for .* numbers that the checkpoint does not have"),
        ("vision_config.hidden_size", 0, "cannot be read"),
        ("vision_config.image_size", 10**6, "asks for 500,000,000,000 numbers"),
        ("text_config", None, "asks for .* numbers that the checkpoint does not have"),
        ("text_config.vocab_size", 2**33, "asks for 274,877,906,944 numbers"),
        ("text_config.hidden_act", "none", "cannot be read"),
        ("text_config.pad_token_id", 10**9, "`pad_token_id` of the language model is 1000000000; expected one of its"),
        ("projection_dim", 10**9, "asks for 64,000,000,000 numbers .* image_projection.1.weight, text_projection"),
    ],
)
def test_a_configuration_of_another_model_makes_no_room(folder, path, value, message):
    change_config(folder, path, value)
    with pytest.raises(ValueError, match=message):
        MMGEMModel.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"', "null"])
def test_a_config_that_is_no_mapping(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        MMGEMConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.num_hidden_layers", 10**9, "`num_hidden_layers` of LlamaConfig is 1000000000; expected at most"),
        ("vision_config.num_hidden_layers", 10**8, "`num_hidden_layers` of SiglipVisionConfig is 100000000; expected"),
        ("text_config.num_hidden_layers", "two", "'num_hidden_layers' expected int, got str"),
        ("text_config", [], "Field 'text_config' with value"),
        ("text_config.num_attention_heads", 0, "`config` cannot be read"),
        ("text_config.model_type", "gpt9", "gpt9"),
        ("text_config.rms_norm_eps", "x", "'rms_norm_eps' expected float, got str"),
        ("text_config.rms_norm_eps", -1e-6, "`rms_norm_eps` of LlamaConfig is -1e-06; expected 0 or more"),
        ("vision_config.layer_norm_eps", math.nan, "`layer_norm_eps` of SiglipVisionConfig is nan; expected a number"),
        ("vision_config.patch_size", -8, "`patch_size` of SiglipVisionConfig is -8; expected 0 or more"),
        ("vision_config.num_attention_heads", -2, "`num_attention_heads` of SiglipVisionConfig is -2; expected 0"),
        ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": 0.0}, "`rope_theta` of .* is 0.0; exp"),
        (
            "text_config.eos_token_id",
            300,
            "`eos_token_id` of the language model is 300; expected one of its 300 token",
        ),
        ("text_config.eos_token_id", [0, 999], r"`eos_token_id` of the language model is \[0, 999\]; expected one"),
        ("text_config.eos_token_id", [], r"`eos_token_id` of the language model is \[\]; expected one"),
        (
            "text_config.bos_token_id",
            300,
            "`bos_token_id` of the language model is 300; expected one of its 300 token",
        ),
        ("text_config.bos_token_id", -2, "`bos_token_id` of the language model is -2; expected one of its 300 tokens"),
        ("logit_scale_init_value", -math.inf, "`logit_scale_init_value` is -inf; expected at most"),
        ("projection_dim", "16", "'projection_dim' expected int, got str"),
        ("projection_dim", True, "'projection_dim' expected int, got bool"),
        ("projection_dim", 0, "`projection_dim` is 0; expected a whole number of at least 1"),
        ("embedding_pooling", "median", "expected one of .'last', 'mean', 'multi_vector'., got median"),
        ("vision_grid", {"layout": "tokens"}, "`vision_grid` is {'layout': 'tokens'}"),
        ("prompts", {"query": 3}, "'prompts'"),
        ("auto_map", 5, "`config` cannot be read"),
        ("dtype", "float99", "`config` cannot be read"),
        ("model_type", "llama", "of type 'llama'; expected 'mmgem'"),
        ("model_type", None, "of type None; expected 'mmgem'"),
    ],
)
def test_a_configuration_with_impossible_values(folder, path, value, message):
    change_config(folder, path, value)
    with pytest.raises(ValueError, match=message):
        MMGEMConfig.from_pretrained(folder)


def test_a_folder_without_config_is_not_the_default_model(folder):
    (folder / "config.json").unlink()
    for load in (MMGEMModel.from_pretrained, MMGEMConfig.from_pretrained):
        with pytest.raises(FileNotFoundError, match="without a config.json"):
            load(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, content)
            for name in ("tokenizer.json", "tokenizer_config.json")
            for content in ("", "{", "[]", "null")
        ),
        *(("processor_config.json", content) for content in ("", "[]", "{}")),
    ],
)
def test_a_processor_with_a_damaged_file(tiny_processor, tmp_path, name, content):
    tiny_processor.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises((OSError, ValueError), match=re.escape(str(tmp_path))):
        MMGEMProcessor.from_pretrained(tmp_path, trust_remote_code=False)


def test_a_run_of_checkpoints_reads_the_processor_once(tiny_processor, tmp_path, monkeypatch):
    build_model().save_pretrained(tmp_path / "source")
    tiny_processor.save_pretrained(tmp_path / "source")
    model, read, names = MMGEMModel.from_pretrained(tmp_path / "source"), AutoProcessor.from_pretrained, []
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name, **kw: names.append(name) or read(name, **kw))
    for checkpoint in ("1", "2"):
        model.save_pretrained(tmp_path / checkpoint)
        assert MMGEMProcessor.from_pretrained(tmp_path / checkpoint).num_visual_tokens == 4
    assert names == [str(tmp_path / "source")]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("processor_config.json", None, r"which cannot be read \(Can't load image processor"),
        ("tokenizer.json", None, r"which cannot be read \(Couldn't instantiate the backend tokenizer"),
        ("generation_config.json", "", "whose generation_config.json cannot be read .Expecting value"),
        ("generation_config.json", "{", "whose generation_config.json cannot be read .*; expected it whole, or"),
        ("generation_config.json", "null", r"which cannot be read \('NoneType' object is not a mapping\)"),
        ("generation_config.json", '{"max_new_tokens": -1}', "which cannot be read .`max_new_tokens` must be"),
        ("generation_config.json", '{"num_beams": "x"}', "`num_beams` is 'x'; expected a whole number"),
        ("generation_config.json", '{"do_sample": 3}', "`do_sample` is 3; expected True or False"),
        ("generation_config.json", '{"eos_token_id": 300}', "`eos_token_id` is 300; expected token ids from 0 to 299"),
        ("generation_config.json", '{"pad_token_id": -5}', "`pad_token_id` is -5; expected token ids from 0 to 299"),
        ("generation_config.json", '{"bos_token_id": [1, 400]}', r"`bos_token_id` is \[1, 400\]; expected token ids"),
        ("generation_config.json", '{"forced_eos_token_id": 400}', "`forced_eos_token_id` is 400; expected token ids"),
        (
            "processor_config.json",
            {"num_visual_tokens": 9},
            "whose processor has 9 as `num_visual_tokens`; expected 4,",
        ),
        ("config.json", {"num_visual_tokens": 9}, "whose processor has 4 as `num_visual_tokens`; expected 9, as the"),
        ("config.json", {"image_token_id": 5}, "whose processor has 1 as `image_token_id`; expected 5, as the"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit(tiny_model, tiny_processor, tmp_path, name, change, message):
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    file = tmp_path / name
    if change is None:
        file.unlink()
    else:
        file.write_text(change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path, device="cpu")


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "old"])
def test_tied_weights_are_kept_on_the_disk_by_an_accelerate_that_reads_them_back(whole, tmp_path, monkeypatch, is_new):
    monkeypatch.setattr(weight_checks, "is_accelerate_available", lambda version: is_new)
    options = {"device_map": "auto", "max_memory": {"cpu": "200KB"}, "offload_folder": tmp_path}
    ids = torch.arange(2, 7)[None]
    if is_new:
        expected = MMGEMModel.from_pretrained(whole).eval().get_text_features(ids).pooler_output
        model = MMGEMModel.from_pretrained(whole, **options).eval()
        assert model.language_model.lm_head.weight.is_meta
        torch.testing.assert_close(model.get_text_features(ids).pooler_output, expected)
    else:
        with pytest.raises(ValueError, match=r"puts language_model\.lm_head\.weight on the disk, .* >= 1\.15"):
            MMGEMModel.from_pretrained(whole, **options)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"": "disk"}, "`device_map` puts the whole model on the disk; expected room for a part of it"),
        ({"vision_tower": "disk"}, r"offloads `vision_tower\.head\.attention`, .*; expected it on the device that"),
        ({"embedding_tokens": "disk"}, "`device_map` puts `embedding_tokens` on the disk; expected it on a device"),
    ],
    ids=["all", "an attention", "a parameter"],
)
def test_what_would_not_come_back_from_the_disk_is_refused(whole, tmp_path, places, message):
    if "" not in places:
        names = {name.partition(".")[0] for name, _ in MMGEMModel.from_pretrained(whole).named_parameters()}
        places = dict.fromkeys(names, "cpu") | places
    with pytest.raises(ValueError, match=message):
        MMGEMModel.from_pretrained(whole, device_map=places, offload_folder=tmp_path)
