"""Weights as people have them: complete, of the right half, in the right type, or refused by name."""

import json

import peft
import pytest
import torch
from families import every
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TEXT_CONFIGS, VISION_CONFIGS, build_towers
from transformers import (
    AutoModel,
    BartConfig,
    BartForConditionalGeneration,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SamConfig,
    SamModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    ViTForImageClassification,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.tower_composition import build_vision_tower

SETTINGS = {"projection_dim": 16, "num_visual_tokens": 4}
_TEXT_HALF = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def _vision(name: str) -> dict:
    return VISION_CONFIGS[name]().to_dict()


def _dual(config_class, text_config_class, vision: str):
    text_config = text_config_class(**_TEXT_HALF, vocab_size=100).to_dict()
    return config_class(text_config=text_config, vision_config=_vision(vision))


# What contains a tower, and where it stands there.
WHOLES = {
    "clip": lambda: (CLIPModel(_dual(CLIPConfig, CLIPTextConfig, "clip")), "vision_model"),
    "siglip": lambda: (SiglipModel(_dual(SiglipConfig, SiglipTextConfig, "siglip")), "vision_model"),
    "llava": lambda: (
        LlavaForConditionalGeneration(
            LlavaConfig(vision_config=_vision("clip"), text_config=TEXT_CONFIGS["llama"]().to_dict())
        ),
        "vision_tower",
    ),
    "paligemma": lambda: (
        PaliGemmaForConditionalGeneration(
            PaliGemmaConfig(
                vision_config=_vision("siglip") | {"projection_dim": 32},
                text_config=TEXT_CONFIGS["gemma2"]().to_dict(),
                projection_dim=32,
            )
        ),
        "vision_tower",
    ),
    "gemma3": lambda: (
        Gemma3ForConditionalGeneration(
            Gemma3Config(vision_config=_vision("siglip"), text_config=TEXT_CONFIGS["gemma3"]().to_dict())
        ),
        "vision_tower",
    ),
    "idefics3": lambda: (
        Idefics3ForConditionalGeneration(
            Idefics3Config(
                vision_config={**_vision("siglip"), "model_type": "idefics3_vision"},
                text_config=TEXT_CONFIGS["llama"]().to_dict(),
            )
        ),
        "vision_model",
    ),
    "sam": lambda: (
        SamModel(
            SamConfig(
                vision_config=_vision("siglip")
                | {
                    "model_type": "sam_vision_model",
                    "window_size": 2,
                    "global_attn_indexes": [1],
                    "output_channels": 16,
                }
            )
        ),
        "vision_encoder",
    ),
}


@pytest.fixture
def language_model():
    return build_towers()[1]


@pytest.mark.parametrize("as_object", [False, True], ids=["by name", "the model itself"])
@pytest.mark.parametrize("name", every(WHOLES, ["clip", "llava", "sam"]))
def test_a_tower_is_taken_out_of_a_larger_model_by_its_own_weights(name, as_object, language_model, tmp_path):
    torch.manual_seed(0)
    whole, place = WHOLES[name]()
    whole.save_pretrained(tmp_path)
    inside = AutoModel.from_pretrained(tmp_path).get_submodule(place)
    model = MMGEMModel.from_towers(whole if as_object else str(tmp_path), language_model, **SETTINGS)
    weights = inside.state_dict()
    found = model.vision_tower.state_dict()
    if name == "sam":  # whose encoder stands inside the model that has its configuration
        found = {key.removeprefix("vision_encoder."): value for key, value in found.items()}
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = inside.eval()(pixel_values).last_hidden_state
    cells = features.flatten(2).mT if features.ndim == 4 else features[:, -16:]
    torch.testing.assert_close(model._patch_grid(pixel_values).flatten(2).mT, cells)


def _edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_and_left_over_weights_of_a_vision_tower_are_named(language_model, tmp_path):
    torch.manual_seed(0)
    tower = build_towers("vit")[0]
    tower.save_pretrained(tmp_path)
    # Nothing reads the pooling head.
    _edit(tmp_path, lambda weights: [weights.pop(key) for key in list(weights) if key.startswith("pooler.")])
    model = MMGEMModel.from_towers(str(tmp_path), language_model, **SETTINGS)
    kept = {key: value for key, value in tower.state_dict().items() if not key.startswith("pooler.")}
    assert all(torch.equal(model.vision_tower.state_dict()[key], value) for key, value in kept.items())
    _edit(tmp_path, lambda weights: weights.pop("encoder.layer.1.intermediate.dense.weight"))  # as older versions say
    with pytest.raises(ValueError, match=r"`vision` is .*, which lacks the weights layers\.1\.mlp\.fc1\.weight of a"):
        MMGEMModel.from_towers(str(tmp_path), language_model, **SETTINGS)
    tower.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="`vision` is .*, which has beyond it the weights .*1"):
        MMGEMModel.from_towers(str(tmp_path), language_model, **SETTINGS)


def test_missing_weights_of_a_language_model_are_named(language_model, tmp_path):
    vision = build_towers()[0]
    language_model.save_pretrained(tmp_path)
    _edit(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"`text` is .*, which lacks the weights model\.layers\.1\.mlp\.up_proj"):
        MMGEMModel.from_towers(vision, str(tmp_path), image_token_id=3, **SETTINGS)


def test_a_classifier_and_shards_are_read(language_model, tmp_path):
    torch.manual_seed(0)
    classifier = ViTForImageClassification(VISION_CONFIGS["vit"]())
    classifier.save_pretrained(tmp_path / "vision", max_shard_size="20KB")
    language_model.save_pretrained(tmp_path / "text", max_shard_size="50KB")
    assert len(list((tmp_path / "vision").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "text").glob("*.safetensors"))) > 1
    model = MMGEMModel.from_towers(str(tmp_path / "vision"), str(tmp_path / "text"), image_token_id=3, **SETTINGS)
    for part, given in ((model.vision_tower, classifier.vit), (model.language_model, language_model)):
        assert all(torch.equal(part.state_dict()[key], value) for key, value in given.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # a tied head stays tied


def test_towers_of_two_types_need_a_third_word(tmp_path):
    vision, text = build_towers()
    text.to(torch.bfloat16)
    with pytest.raises(ValueError, match="`vision` is of torch.float32 and `text` of torch.bfloat16; .*`dtype`"):
        MMGEMModel.from_towers(vision, text, **SETTINGS)
    for dtype in ("bfloat16", torch.float16):
        model = MMGEMModel.from_towers(vision, text, dtype=dtype, **SETTINGS)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype) if isinstance(dtype, str) else dtype}
        model.save_pretrained(tmp_path)
        assert MMGEMModel.from_pretrained(tmp_path).dtype == model.dtype
    model = MMGEMModel.from_towers(vision.to(torch.bfloat16), text, **SETTINGS)
    assert model.dtype == torch.bfloat16
    assert model.get_image_features(torch.randn(1, 3, 32, 32)).pooler_output.isfinite().all()


@pytest.mark.skipif(Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="transformers asks for a newer peft")
@pytest.mark.parametrize("half", ["vision", "text"])
def test_adapters_are_merged(half):
    towers = dict(zip(("vision", "text"), build_towers(), strict=True))
    adapted = get_peft_model(towers[half], LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)).eval()
    pixel_values, input_ids = torch.randn(1, 3, 32, 32), torch.tensor([[5, 6, 7]])
    run = {
        "vision": lambda tower: tower(pixel_values).last_hidden_state,
        "text": lambda tower: tower(input_ids).logits[..., :300],
    }[half]
    expected = run(adapted)
    model = MMGEMModel.from_towers(**towers | {half: adapted}, **SETTINGS)
    part = model.vision_tower if half == "vision" else model.language_model
    torch.testing.assert_close(run(part), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(adapted), expected)  # and the model that was given is as it was
    assert not any("lora" in name for name in model.state_dict())
    plain = dict(zip(("vision", "text"), build_towers(), strict=True))
    plain[half].add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match=f"`{half}` has PEFT adapters beside its weights; expected them merged"):
        MMGEMModel.from_towers(**plain, **SETTINGS)


def test_a_model_read_from_gguf_can_be_saved(tmp_path):
    """`from_pretrained(gguf_file=...)` leaves a quantization config on a model of floating point."""
    vision, text = build_towers()
    text.config.quantization_config = {"quant_method": "gguf"}
    model = MMGEMModel.from_towers(vision, text, **SETTINGS)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    loaded = MMGEMModel.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())


def cross_attending():
    return GPT2LMHeadModel(GPT2Config(**{**TEXT_CONFIGS["gpt2"]().to_dict(), "add_cross_attention": True}))


def encoder_decoder():
    sides = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    return BartForConditionalGeneration(BartConfig(d_model=32, vocab_size=100, **sides))


def quantized():
    model = build_towers()[1]
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (cross_attending, "`gpt2` .*cross-attention"),
        (encoder_decoder, "`text` is a `bart` model, an encoder-decoder"),
        (lambda: WHOLES["llava"]()[0], "`text` is a `llava` model, of which text is one part"),
        (lambda: build_towers("vit")[0], "`text` is a `vit` model; expected a causal language model"),
        (quantized, r"`text` is quantized, `model.layers.0.mlp.up_proj.weight` is torch.int8"),
    ],
)
def test_what_is_no_language_model_is_refused(text, message, tmp_path):
    text = text()
    with pytest.raises(ValueError, match=message):
        MMGEMModel.from_towers(build_towers()[0], text, **SETTINGS)
    if "quantized" not in message:
        text.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            MMGEMModel.from_towers(build_towers()[0], str(tmp_path), **SETTINGS)


def test_a_class_that_no_auto_model_knows_is_asked_for_by_name():
    with pytest.raises(ValueError, match="`vision_config` is of type `blip_vision_model` with `architectures` None"):
        build_vision_tower(BlipVisionConfig())


def test_a_vocabulary_without_room_is_refused(language_model, monkeypatch):
    def fixed(*args, **kwargs):
        raise NotImplementedError("the embeddings are hashed")

    monkeypatch.setattr(language_model, "resize_token_embeddings", fixed)
    with pytest.raises(ValueError, match="`text` is a `llama`, whose vocabulary of 300 has no room for .*hashed"):
        MMGEMModel.from_towers(build_towers()[0], language_model, **SETTINGS)
    MMGEMModel.from_towers(build_towers()[0], language_model, image_token_id=299, **SETTINGS)
