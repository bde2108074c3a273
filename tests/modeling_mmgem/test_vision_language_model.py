"""An MM-GEM that began as a VLM writes what the VLM writes, whatever is then done to it, and embeds."""

import copy
from functools import cache

import pytest
import torch
from families import every
from peft import LoraConfig, get_peft_model
from tiny_models import build_towers
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    BlipConfig,
    Florence2Config,
    FuyuConfig,
    GitConfig,
    Llama4Config,
    MllamaConfig,
)
from vlms import IMAGE, REFUSED_VLMS, SIDE, VLM_CONFIGS, build_vlm, build_vlm_processor, vlm_inputs

from mmgem.modeling_mmgem import MMGEMModel

GREEDY = {"max_new_tokens": 5, "do_sample": False}
FAMILIES = sorted(set(VLM_CONFIGS) - set(REFUSED_VLMS))
# For `make test`: images in four and in five dimensions; causal, seeing their own tokens, and seeing the prompt.
QUICK = "llava", "idefics3", "gemma3", "paligemma"
every_family = pytest.mark.parametrize("family", every(FAMILIES, QUICK))


@cache
def _composed(family: str, has_processor: bool, **config_kwargs) -> tuple:
    vlm = build_vlm(family)
    processor = build_vlm_processor(family) if has_processor else None
    model = MMGEMModel.from_vlm(vlm, processor=processor, projection_dim=16, num_visual_tokens=4, **config_kwargs)
    torch.nn.init.normal_(model.pool_aggregator.output.weight, std=0.1)
    return vlm, model


def compose(family: str, has_processor: bool = False, **config_kwargs) -> tuple:
    """A VLM and the model that it becomes, copies of those that are built once."""
    torch.manual_seed(0)
    return copy.deepcopy(_composed(family, has_processor, **config_kwargs))


def assert_writes_like(model, vlm, inputs):
    with torch.no_grad():
        is_token = inputs["attention_mask"].bool()  # of padding, implementations of attention make different things
        expected = vlm(**inputs).logits[is_token]
        torch.testing.assert_close(model(**inputs).logits[is_token], expected, rtol=0, atol=1e-5)


@every_family
@torch.no_grad()
def test_writes_exactly_what_the_vlm_writes(family):
    vlm, model = compose(family)
    inputs = vlm_inputs(family)
    assert_writes_like(model, vlm, inputs)
    text_only = {name: inputs[name] % IMAGE for name in ("input_ids", "attention_mask")}
    assert_writes_like(model, vlm, text_only)
    ways = [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}]
    for options in ways[: 3 if family == "paligemma" else 4]:  # a static cache its own generation cannot fill
        expected = vlm.generate(**inputs, **GREEDY, **options)
        assert torch.equal(model.generate(**inputs, **GREEDY, **options), expected), options


@torch.no_grad()
def test_beams_see_the_images_of_their_own_prompt():
    _, model = compose("llava")
    prompts = []  # of two images each
    for seed in (0, 1):
        inputs = vlm_inputs("llava", seed, texts=(3, 3))
        prompts.append({n: v if n == "pixel_values" else v.reshape(1, -1) for n, v in inputs.items()})
    together = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
    options = GREEDY | {"num_beams": 2, "num_return_sequences": 2}
    answers = torch.cat([model.generate(**prompt, **options) for prompt in prompts])
    assert torch.equal(model.generate(**together, **options), answers)


@every_family
def test_loss_of_a_prompt_is_that_of_the_vlm(family):
    vlm, model = compose(family)
    inputs = vlm_inputs(family)
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    expected = vlm(**inputs, labels=labels).loss
    loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, vlm.get_input_embeddings().weight.grad)


@every_family
@torch.no_grad()
def test_embedding_token_is_read_like_a_token_that_the_vlm_wrote(family):
    vlm, model = compose(family)
    token, inputs = 77, vlm_inputs(family)
    model.embedding_tokens.copy_(model.get_input_embeddings()(torch.tensor([token])))
    written = vlm._update_model_kwargs_for_generation({}, dict(inputs))
    written["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 1), value=token)
    expected = vlm(**written, output_hidden_states=True).hidden_states[-1][:, -1]
    states = model.get_multimodal_features(**inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-4)


@every_family
@torch.no_grad()
def test_fused_embedding_does_not_depend_on_padding_and_batch(family):
    _, model = compose(family, num_embedding_tokens=3, embedding_pooling="multi_vector")
    inputs = vlm_inputs(family)
    together = model.get_multimodal_features(**inputs).pooler_output
    right = {
        name: torch.stack([row.roll(-int((mask == 0).sum())) for row, mask in zip(value, inputs["attention_mask"])])
        if value.shape == inputs["input_ids"].shape
        else value
        for name, value in inputs.items()
    }
    torch.testing.assert_close(model.get_multimodal_features(**right).pooler_output, together, rtol=0, atol=1e-5)
    pixels = len(inputs["pixel_values"]) // 2
    padding = int((inputs["attention_mask"][1] == 0).sum())
    alone = {
        name: value[1:, padding:]
        if value.shape == inputs["input_ids"].shape
        else value[pixels if name == "pixel_values" else 1 :]
        for name, value in inputs.items()
    }
    torch.testing.assert_close(model.get_multimodal_features(**alone).pooler_output, together[1:], rtol=0, atol=1e-5)
    other = {**alone, "pixel_values": alone["pixel_values"].flip(-1)}
    assert (model.get_multimodal_features(**other).pooler_output - together[1:]).abs().max() > 1e-3
    # The first [EMB] vectors are what fewer would be.
    model.embedding_tokens.data[-1] = model.embedding_tokens.data[-1].flip(0)
    changed = model.get_multimodal_features(**alone).pooler_output
    torch.testing.assert_close(changed[:, :2], together[1:, :2], rtol=0, atol=1e-5)
    assert (changed[:, 2] - together[1:, 2]).abs().max() > 1e-3


@torch.no_grad()
def test_boxes_in_a_prompt_are_read_from_visual_tokens():
    _, model = compose("llava")
    image = torch.randn(1, 3, SIDE, SIDE)
    prompt = {"input_ids": torch.tensor([[2] + [IMAGE] * 4 + [5, 6]]), "attention_mask": torch.ones(1, 7).long()}
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5]]])
    written = model.generate(**prompt, pixel_values=image, boxes=boxes, **GREEDY)
    assert written[:, :7].tolist() == prompt["input_ids"].tolist()
    embeds = model.embed_prompt(prompt["input_ids"], image, boxes)
    logits = model(**prompt, pixel_values=image, boxes=boxes).logits
    expected = model.language_model(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, expected)
    assert written[0, 7] == expected[0, -1].argmax()


@every_family
def test_state_dict_names_every_weight_once(family):
    vlm, model = compose(family)
    own = {id(parameter) for parameter in model.parameters()}
    assert own >= {id(parameter) for parameter in model.vlm.of(model).parameters()}
    parts = {"vision_tower", "language_model", "connector"}
    weights = [p for name, p in model.named_parameters() if name.split(".")[0] in parts]
    assert sum(p.numel() for p in weights) == sum(p.numel() for p in vlm.parameters())


@pytest.mark.parametrize("family", ["llava", "gemma3", "idefics3"])
def test_goes_on_to_run_on_what_the_model_became(family):
    vlm, model = compose(family)
    inputs = vlm_inputs(family)

    copied = copy.deepcopy(model)
    assert_writes_like(copied, vlm, inputs)
    with torch.no_grad():
        for parameter in copied.connector.parameters():
            parameter.mul_(1.5)
    assert_writes_like(model, vlm, inputs)  # the copy has its own
    before = model(**inputs).logits
    assert (copied(**inputs).logits - before).abs().max() > 1e-3

    model.set_attn_implementation("eager")
    assert_writes_like(model, vlm, inputs)
    double = copy.deepcopy(model).double()
    assert double(**inputs | {"pixel_values": inputs["pixel_values"].double()}).logits.dtype == torch.float64

    model.vision_tower.requires_grad_(False)
    model(**inputs).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())
    assert all(parameter.grad is not None for parameter in model.connector.parameters())


def test_adapters_of_every_part_are_seen():
    vlm, model = compose("llava")
    inputs = vlm_inputs("llava")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "linear_1", "lm_head"], r=2))
    assert_writes_like(model, vlm, inputs)
    before = model(**inputs).logits
    for name in "lora_B.default.weight", "connector.multi_modal_projector.linear_1.lora_B", "lm_head.lora_B":
        weight = next(p for key, p in adapted.named_parameters() if name in key)
        with torch.no_grad():
            weight.add_(0.3)
            assert (model(**inputs).logits - before).abs().max() > 1e-4, name
            weight.sub_(0.3)


def test_vocabulary_can_grow():
    vlm, model = compose("gemma3")  # whose head is tied
    inputs = vlm_inputs("gemma3")
    model.resize_token_embeddings(310, mean_resizing=False)
    vlm.resize_token_embeddings(310, mean_resizing=False)
    logits, expected = model(**inputs).logits, vlm(**inputs).logits
    assert logits.shape[-1] == 310
    torch.testing.assert_close(logits[..., :300], expected[..., :300])


@every_family
def test_saved_and_loaded(family, tmp_path):
    vlm, model = compose(family)
    inputs = vlm_inputs(family)
    model.save_pretrained(tmp_path)
    loaded, report = MMGEMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_writes_like(loaded, vlm, inputs)
    expected = model.get_multimodal_features(**inputs).pooler_output
    torch.testing.assert_close(loaded.get_multimodal_features(**inputs).pooler_output, expected)


def test_starts_from_a_folder(tmp_path):
    vlm = build_vlm("llava")
    vlm.save_pretrained(tmp_path)
    model = MMGEMModel.from_vlm(str(tmp_path), projection_dim=16, num_visual_tokens=4)
    assert_writes_like(model, vlm, vlm_inputs("llava"))
    state = vlm.state_dict()
    state.pop("model.multi_modal_projector.linear_2.weight")
    vlm.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks .*linear_2.weight"):
        MMGEMModel.from_vlm(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MllamaConfig, "cross-attention"),
        (Florence2Config, "encoder-decoder"),
        (BlipConfig, "image_token_id|cross-attention|decoder"),
        (FuyuConfig, "vision encoder"),
        (Blip2Config, "no token that stands for an image"),
        (GitConfig, "no token that stands for an image"),
        (Llama4Config, "keeps its vocabulary head within its decoder"),
    ],
)
def test_refuses_what_is_no_vision_encoder_and_causal_language_model(config, reason):
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(config())
    with pytest.raises(ValueError, match=f"{vlm.config.model_type}.*({reason})"):
        MMGEMModel.from_vlm(vlm)


def test_refuses_what_is_no_vlm():
    with pytest.raises(ValueError, match="`vlm` is a `llama`, which is no image-text-to-text model of transformers"):
        MMGEMModel.from_vlm(build_towers()[1])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_refuses_an_encoder_of_patches_in_one_row(family):
    with pytest.raises(ValueError, match=f"{family}.*without a patch grid.*grid_thw"):
        MMGEMModel.from_vlm(build_vlm(family))


# Training: packed rows read images as the VLM does


NOT_PACKED = "llava_next", "llava_onevision"  # which read images in tiles
TRAINED = {family: "causal" for family in FAMILIES if family not in (*NOT_PACKED, "smolvlm")}
TRAINED |= {"gemma3": "image", "paligemma": "prompt"}
every_trained_family = pytest.mark.parametrize("family", every(TRAINED, QUICK))


def compose_to_train(family: str) -> tuple:
    return compose(family, has_processor=family in ("gemma3", "paligemma"))


def joint_batch(family: str) -> tuple[dict, dict]:
    """Two captions after prompts of one image each, one of them embedded too, and what a VLM's processor would say."""
    prompts = vlm_inputs(family, texts=(3, 3))  # of equal length, without padding
    answer = torch.tensor([[11, 12, 13], [14, 15, 0]])
    is_image = prompts["input_ids"][0] == IMAGE
    first = int(is_image.nonzero()[0])
    keep = ~is_image | (torch.arange(len(is_image)) == first)  # one placeholder for each image
    written = torch.cat([prompts["input_ids"][:, keep], answer], dim=1)  # (2, L)
    labels = written.clone()
    labels[:, : -answer.shape[1]] = -100
    embedded = torch.nn.functional.pad(torch.tensor([[21, 22], [23, 24]]), (0, written.shape[1] - 2))
    pixels = prompts["pixel_values"]
    batch = {
        "input_ids": torch.cat([written, embedded]),
        "attention_mask": torch.cat([torch.ones_like(written), (embedded != 0).long()]),
        "labels": torch.cat([labels, torch.full_like(labels, -100)]),
        "image_index": torch.tensor([0, 1, 0, 1]),
        "contrastive_mask": torch.tensor([False, False, True, True]),
        "pixel_values": pixels[:, 0] if pixels.ndim == 5 else pixels,
        "return_loss": True,
    }
    of_vlm = dict(prompts)
    for _ in range(3):
        of_vlm = build_vlm(family)._update_model_kwargs_for_generation({}, of_vlm)
    of_vlm["input_ids"] = torch.cat([prompts["input_ids"], answer], dim=1)
    of_vlm["labels"] = torch.nn.functional.pad(answer, (of_vlm["input_ids"].shape[1] - 3, 0), value=-100)
    return batch, of_vlm


@every_trained_family
def test_caption_loss_and_gradients_are_those_of_the_vlm(family):
    vlm, model = compose_to_train(family)
    assert model.config.vlm_attention == TRAINED[family]
    batch, of_vlm = joint_batch(family)
    # The end token of the first caption is added by the joint step.
    batch["labels"][0, -1] = batch["input_ids"][0, -1] = of_vlm["input_ids"][0, -1] = of_vlm["labels"][0, -1] = 0
    logits = vlm(**{name: value for name, value in of_vlm.items() if name != "labels"}).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), of_vlm["labels"][:, 1:].flatten())
    output = model(**batch)
    torch.testing.assert_close(output.caption_loss, expected, rtol=0, atol=1e-4)
    expected.backward()
    output.caption_loss.backward()
    of = dict(model.vlm.of(model).named_parameters())
    for name, parameter in vlm.named_parameters():
        if parameter.grad is not None and of[name].grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(of[name].grad / scale, parameter.grad / scale, rtol=0, atol=1e-3)


@every_trained_family
def test_joint_step_embeds_as_the_features_do(family):
    _, model = compose_to_train(family)
    batch, _ = joint_batch(family)
    prompts = vlm_inputs(family, texts=(3, 3))
    rows = batch["input_ids"][:2, :-3]  # the prompts, to be embedded with their images
    batch["input_ids"] = torch.cat([torch.nn.functional.pad(rows, (0, 3)), batch["input_ids"][2:]])
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    batch["labels"][:] = -100
    batch["fused_index"] = torch.tensor([0, 1, -1, -1])
    batch["contrastive_mask"][:] = True
    embeds = model(**batch).text_embeds
    fused = model.get_multimodal_features(**prompts).pooler_output
    texts = model.get_text_features(batch["input_ids"][2:], batch["attention_mask"][2:]).pooler_output
    expected = torch.nn.functional.normalize(torch.cat([fused, texts]), dim=-1)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)


@every_trained_family
def test_a_training_step_reaches_every_part(family):
    _, model = compose_to_train(family)
    batch, _ = joint_batch(family)
    batch["boxes"] = torch.tensor([[[0.0, 0.0, 0.5, 0.5]], [[0.25, 0.25, 1.0, 1.0]]])
    batch["input_ids"] = torch.cat([batch["input_ids"], torch.full_like(batch["input_ids"][:1], 30)])
    for name, value in (("attention_mask", 1), ("labels", 30), ("image_index", 1), ("contrastive_mask", True)):
        batch[name] = torch.cat([batch[name], torch.full_like(batch[name][:1], value)])
    batch["box_index"] = torch.tensor([-1, -1, -1, -1, 0])
    output = model(**batch)
    output.loss.backward()
    missing = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    # LLaVA's last layer and pooled output have no part, nor what Janus draws images with.
    assert missing <= {"vision_tower", *(["connector"] if family == "janus" else [])}
    for part in "vision_tower", "connector", "language_model", "token_projection", "text_projection":
        assert any(p.grad is not None and p.grad.any() for p in getattr(model, part).parameters()), part


@pytest.mark.families
@pytest.mark.parametrize("family", NOT_PACKED)
def test_images_in_tiles_are_no_part_of_packed_rows_but_all_else_is(family):
    _, model = compose_to_train(family)
    batch, _ = joint_batch("llava")
    with pytest.raises(ValueError, match=f"`vlm_attention` is 'unknown': a `{family}` reads prompts .* in tiles"):
        model(**batch)
    texts = {name: value[2:] for name, value in batch.items() if name in ("input_ids", "attention_mask", "labels")}
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5]], [[0.25, 0.25, 1.0, 1.0]]])
    texts |= {"pixel_values": batch["pixel_values"], "boxes": boxes, "return_loss": True}
    texts["labels"] = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, -100)
    output = model(**texts, image_index=torch.tensor([0, 1]), box_index=torch.tensor([0, 0]))
    assert output.caption_loss > 0
    alone = model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
    torch.testing.assert_close(output.text_embeds, torch.nn.functional.normalize(alone, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "edited"), [("llava", "prompt"), ("gemma3", "causal"), ("paligemma", "image")])
def test_a_reading_that_the_vlm_does_not_have_is_refused(family, edited):
    _, model = compose_to_train(family)
    found, model.config.vlm_attention = model.config.vlm_attention, edited
    batch, _ = joint_batch(family)
    with pytest.raises(ValueError, match=f"`vlm_attention` is '{edited}' .*; expected .*'{found}'"):
        model(**batch)
    assert model.config.vlm_attention == edited


def test_a_reading_that_packed_rows_do_not_have_is_refused():
    _, model = compose_to_train("gemma3")
    model.config.vlm_attention = "unknown"
    batch, _ = joint_batch("gemma3")
    with pytest.raises(ValueError, match="unknown.*gemma3.*processor"):
        model(**batch)
    text_only = {name: batch[name][2:] for name in ("input_ids", "attention_mask", "labels", "contrastive_mask")}
    model(**text_only, image_index=batch["image_index"][2:], pixel_values=batch["pixel_values"], return_loss=True)
    batch["input_ids"][0, 0] = IMAGE
    model.config.vlm_attention = "image"
    with pytest.raises(ValueError, match="placeholders in texts that go with"):
        model(**batch)
