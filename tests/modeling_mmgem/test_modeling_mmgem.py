import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import IMAGE_SIZE, TEXT_CONFIGS, VISION_CONFIGS, build_model, build_towers

from mmgem.modality_calibrator import ModalityCalibrator
from mmgem.modeling_mmgem import MMGEMModel, MMGEMOutput
from mmgem.text_rows import IGNORED_LABEL

TOWERS = [
    ("clip", "llama"),
    ("siglip", "qwen3"),
    ("siglip2", "gemma2"),
    ("vit", "gpt2"),
    ("dinov2", "gemma3"),
    ("dinov2_with_registers", "granite"),
    ("dinov3", "cohere"),
]
every_tower_pair = pytest.mark.parametrize(("vision", "text"), TOWERS, ids=["+".join(pair) for pair in TOWERS])


def prompts(model, batch=3, question_length=0):
    """`<image>` and the same question for each image."""
    input_ids = torch.full((batch, model.config.num_visual_tokens + question_length), model.config.image_token_id)
    input_ids[:, model.config.num_visual_tokens :] = torch.arange(10, 10 + question_length)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def left_padded(batch):
    """The same texts, padding moved to the left."""
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: tensor.gather(1, order) for name, tensor in batch.items()}


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *args: calls.append(1))
    return calls


class OtherLinear(torch.nn.Linear):
    """A layer that is more than its weights, as those of quantization and LoRA are."""


@pytest.mark.parametrize(
    "config",
    [{"num_embedding_tokens": 3, "embedding_pooling": "multi_vector"}, {"embedding_prompt_ids": [17, 5]}],
    ids=["multi_vector", "prompt"],
)
def test_linear_layers_get_two_or_three_dimensions(config, text_batch, pixel_values):
    """The 8-bit layers of bitsandbytes take no others."""
    model = build_model(**config)
    shapes: set[int] = set()
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    for linear in linears:
        linear.__class__ = OtherLinear
        linear.register_forward_pre_hook(lambda module, inputs: shapes.add(inputs[0].ndim))
    images = len(pixel_values)
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.2, 0.2, 1, 1]]).expand(images, 2, 4)
    model.get_image_features(pixel_values, boxes=boxes)
    model.generate(**prompts(model, images), pixel_values=pixel_values, max_new_tokens=1)
    model.get_multimodal_features(**prompts(model, images), pixel_values=pixel_values)
    if not config.get("embedding_prompt_ids"):
        model(**text_batch, pixel_values=pixel_values, return_loss=True)
        model.similarity_map(pixel_values, text_batch["input_ids"])
    assert linears and shapes <= {2, 3}


# Contract 1: an embedding depends on its input alone.


@every_tower_pair
@pytest.mark.parametrize("text_attention", ["causal", "bidirectional"])
def test_text_embedding_is_independent_of_padding_and_batch(vision, text, text_attention, text_batch):
    model = build_model(vision, text, num_embedding_tokens=2, embedding_pooling="mean", text_attention=text_attention)
    together = model.get_text_features(**text_batch).pooler_output
    moved = model.get_text_features(**left_padded(text_batch)).pooler_output
    torch.testing.assert_close(moved, together, rtol=0, atol=1e-5)
    for row, length in enumerate(text_batch["attention_mask"].sum(1)):
        alone = model.get_text_features(text_batch["input_ids"][row : row + 1, :length]).pooler_output
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


@every_tower_pair
@pytest.mark.parametrize("text_attention", ["causal", "bidirectional"])
def test_joint_step_embeds_as_the_separate_calls_do(vision, text, text_attention, text_batch, pixel_values):
    model = build_model(vision, text, text_attention=text_attention)
    joint = model(**text_batch, pixel_values=pixel_values, return_loss=True)
    separate = model(**text_batch, pixel_values=pixel_values)
    torch.testing.assert_close(joint.text_embeds, separate.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(joint.logits_per_image, separate.logits_per_image, rtol=0, atol=1e-4)


def test_image_embedding_is_independent_of_batch(tiny_model, pixel_values):
    together = tiny_model.get_image_features(pixel_values).pooler_output
    alone = torch.cat([tiny_model.get_image_features(image[None]).pooler_output for image in pixel_values])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_multimodal_embedding_is_independent_of_padding(tiny_model, pixel_values):
    batch = prompts(tiny_model, question_length=3)
    padded = {
        "input_ids": F.pad(batch["input_ids"], (2, 1)),
        "attention_mask": F.pad(batch["attention_mask"], (2, 1)),
    }
    expected = tiny_model.get_multimodal_features(**batch, pixel_values=pixel_values).pooler_output
    actual = tiny_model.get_multimodal_features(**padded, pixel_values=pixel_values).pooler_output
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_empty_text_is_the_read_out_of_the_embedding_tokens_alone(tiny_model):
    empty = tiny_model.get_text_features(torch.zeros(1, 0, dtype=torch.long)).pooler_output
    padded = tiny_model.get_text_features(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4)).pooler_output
    torch.testing.assert_close(padded, empty, rtol=0, atol=1e-5)
    assert empty.isfinite().all()


# Contract 2: what an embedding costs.


def test_image_embedding_runs_no_language_model(tiny_model, pixel_values):
    calls = count_calls(tiny_model.language_model.get_decoder().layers[0])
    tiny_model.get_image_features(pixel_values, torch.tensor([[[0.0, 0.0, 0.5, 0.5]]]).expand(3, -1, -1))
    assert not calls


def test_text_embedding_runs_no_vocabulary_head(tiny_model, text_batch, pixel_values):
    calls = count_calls(tiny_model.get_output_embeddings())
    tiny_model.get_text_features(**text_batch)
    tiny_model.get_multimodal_features(**prompts(tiny_model), pixel_values=pixel_values)
    assert not calls


def test_joint_step_runs_each_tower_once(tiny_model, text_batch, pixel_values):
    tiny_model._check_reading()  # which the first run does, by runs of its own
    vision = count_calls(tiny_model.vision_tower)
    language = count_calls(tiny_model.language_model.get_decoder())
    tiny_model(**text_batch, pixel_values=pixel_values, return_loss=True)
    assert (len(vision), len(language)) == (1, 1)


# Contract 3: what a text sees.


def test_causal_text_embedding_never_sees_an_image(tiny_model, text_batch, pixel_values):
    first = tiny_model(**text_batch, pixel_values=pixel_values, return_loss=True).text_embeds
    second = tiny_model(**text_batch, pixel_values=pixel_values.flip(0) + 1, return_loss=True).text_embeds
    assert torch.equal(first, second)


@every_tower_pair
def test_caption_loss_sees_its_image_its_prompt_and_its_past(vision, text, text_batch, pixel_values):
    """The packed joint step against one plain prompt per caption."""
    model = build_model(vision, text)
    eos = model.config.text_config.eos_token_id
    total, count = 0.0, 0
    for image, ids, mask in zip(pixel_values, *text_batch.values(), strict=True):
        caption = torch.cat([ids[mask.bool()], torch.tensor([eos])])
        visual = torch.full((model.config.num_visual_tokens,), model.config.image_token_id)
        labels = torch.cat([torch.full_like(visual, IGNORED_LABEL), caption])
        loss = model(torch.cat([visual, caption])[None], image[None], labels=labels[None]).loss
        total, count = total + loss * len(caption), count + len(caption)
    joint = model(**text_batch, pixel_values=pixel_values, return_loss=True)
    torch.testing.assert_close(joint.caption_loss, total / count)
    torch.testing.assert_close(joint.loss, joint.caption_loss + joint.contrastive_loss)


def test_captions_follow_their_image(tiny_model, pixel_values):
    logits = tiny_model(**prompts(tiny_model, 1), pixel_values=pixel_values[:1]).logits
    other = tiny_model(**prompts(tiny_model, 1), pixel_values=pixel_values[1:2]).logits
    assert (logits[0, -1] - other[0, -1]).abs().max() > 1e-4


@pytest.mark.parametrize(("text_attention", "moves"), [("causal", False), ("bidirectional", True)])
def test_bidirectional_attention_looks_ahead_and_causal_does_not(text_attention, moves):
    model = build_model(text_attention=text_attention)
    model._check_reading()  # which the first run does, by runs of its own
    states = []
    model.language_model.get_decoder().layers[-1].register_forward_hook(lambda *args: states.append(args[2][0]))
    for last_token in (20, 21):
        model.get_text_features(torch.tensor([[5, 6, 7, last_token]]))
    change = (states[0].view(5, -1)[0] - states[1].view(5, -1)[0]).abs().max()
    assert (change > 1e-5) == moves


# The joint loss with regions, long texts and questions.


def test_regions_are_captioned_from_their_own_tokens(tiny_model, text_batch, pixel_values):
    boxes = torch.rand(3, 2, 2, 2).sort(-2).values.flatten(-2)
    outputs = tiny_model(
        **text_batch,
        pixel_values=pixel_values,
        boxes=boxes,
        return_loss=True,
        image_index=torch.tensor([2, 0, 1]),
        box_index=torch.tensor([1, 0, -1]),
    )
    n, eos = tiny_model.config.num_visual_tokens, 0
    total, count = 0.0, 0
    for row, (image, box) in enumerate([(2, 1), (0, 0), (1, None)]):
        mask = text_batch["attention_mask"][row].bool()
        caption = torch.cat([text_batch["input_ids"][row][mask], torch.tensor([eos])])
        input_ids = torch.cat([torch.full((n,), 1), caption])[None]
        labels = input_ids.masked_fill(input_ids == 1, IGNORED_LABEL)
        box = None if box is None else boxes[image, box].view(1, 1, 4)
        loss = tiny_model(input_ids, pixel_values[image][None], boxes=box, labels=labels).loss
        total, count = total + loss * len(caption), count + len(caption)
    torch.testing.assert_close(outputs.caption_loss, total / count)


def test_rows_without_labels_are_only_embedded_and_masked_rows_only_generated(tiny_model, text_batch, pixel_values):
    labels = text_batch["input_ids"].masked_fill(text_batch["attention_mask"] == 0, IGNORED_LABEL)
    labels[0] = IGNORED_LABEL
    arguments = {"pixel_values": pixel_values, "return_loss": True}
    outputs = tiny_model(**text_batch, **arguments, labels=labels, contrastive_mask=torch.tensor([True, True, False]))
    assert outputs.text_embeds.shape[0] == 2
    generated = tiny_model(
        text_batch["input_ids"][1:], pixel_values[1:], text_batch["attention_mask"][1:], return_loss=True
    )
    torch.testing.assert_close(outputs.caption_loss, generated.caption_loss)


def test_caption_loss_is_divided_by_num_items_in_batch(tiny_model, text_batch, pixel_values):
    tokens = int(text_batch["attention_mask"].sum()) + 3  # an end token each
    mean = tiny_model(**text_batch, pixel_values=pixel_values, return_loss=True).caption_loss
    share = tiny_model(
        **text_batch, pixel_values=pixel_values, return_loss=True, num_items_in_batch=4 * tokens
    ).caption_loss
    torch.testing.assert_close(share, mean / 4)


@every_tower_pair
def test_every_part_learns_from_the_joint_loss(vision, text, text_batch, pixel_values):
    model = build_model(vision, text)
    model(**text_batch, pixel_values=pixel_values, return_loss=True).loss.backward()
    parts = ["pool_aggregator", "image_projection", "text_projection", "token_projection", "embedding_tokens"]
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in [*parts, "logit_scale", "language_model"]:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    patch_embedding = next(
        p for n, p in model.vision_tower.named_parameters() if "patch_embedding" in n or "proj" in n
    )
    assert patch_embedding.grad.abs().sum() > 0


@pytest.mark.slow
def test_one_batch_is_learned(text_batch, pixel_values):
    model = build_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        outputs = model(**text_batch, pixel_values=pixel_values, return_loss=True)
        if outputs.caption_loss < 0.03 and outputs.contrastive_loss < 0.03:
            break
        outputs.loss.backward()
        optimizer.step()
    assert outputs.caption_loss < 0.05 and outputs.contrastive_loss < 0.05
    generated = model.eval().generate(**prompts(model), pixel_values=pixel_values, max_new_tokens=8, do_sample=False)
    for row, (ids, mask) in enumerate(zip(*text_batch.values(), strict=True)):
        caption = generated[row, model.config.num_visual_tokens :]
        assert torch.equal(caption[: int(mask.sum())], ids[mask.bool()])


def test_activation_checkpointing_changes_nothing(text_batch, pixel_values):
    gradients = []
    for checkpointing in (False, True):
        model = build_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**text_batch, pixel_values=pixel_values, return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_temperature_is_clamped(tiny_model, text_batch, pixel_values):
    tiny_model.logit_scale.data.fill_(10.0)
    outputs = tiny_model(**text_batch, pixel_values=pixel_values)
    expected = 100 * outputs.image_embeds @ outputs.text_embeds.T
    torch.testing.assert_close(outputs.logits_per_image, expected)


# Generation.


@every_tower_pair
def test_generation_with_and_without_cache_agree(vision, text, pixel_values):
    model = build_model(vision, text)
    arguments = {**prompts(model, question_length=2), "pixel_values": pixel_values, "do_sample": False}
    cached = model.generate(**arguments, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(cached, model.generate(**arguments, max_new_tokens=6, min_new_tokens=6, use_cache=False))
    beams = model.generate(**arguments, max_new_tokens=6, num_beams=3)
    assert beams.shape[0] == 3


@pytest.mark.parametrize("takes_it", [True, False])
def test_a_prompt_gets_logits_where_they_are_read(tiny_model, pixel_values, monkeypatch, takes_it):
    assert tiny_model._takes_logits_to_keep
    monkeypatch.setattr(tiny_model, "_takes_logits_to_keep", takes_it)
    inputs = {**prompts(tiny_model, question_length=2), "pixel_values": pixel_values}
    logits = tiny_model(**inputs).logits  # (B, L, vocabulary)
    assert logits.shape[1] == inputs["input_ids"].shape[1]
    torch.testing.assert_close(tiny_model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(tiny_model(**inputs, logits_to_keep=torch.tensor([1])).logits, logits[:, 1:2])
    if takes_it:
        read, head = [], tiny_model.get_output_embeddings()
        hook = head.register_forward_hook(lambda head, states, logits: read.append(logits.shape[1]))
        tiny_model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        hook.remove()
        assert read == [1, 1, 1]


def test_generation_from_left_padding_is_unchanged(tiny_model, pixel_values):
    batch = prompts(tiny_model, question_length=2)
    plain = tiny_model.generate(
        **batch, pixel_values=pixel_values, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    padded = {name: F.pad(tensor, (3, 0)) for name, tensor in batch.items()}
    moved = tiny_model.generate(
        **padded, pixel_values=pixel_values, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert torch.equal(moved[:, 3:], plain)


def test_boxes_of_one_image_feed_several_prompts(tiny_model, pixel_values):
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 1.0, 1.0]]])
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = tiny_model.generate(**prompts(tiny_model, 2), pixel_values=pixel_values[:1], boxes=boxes, **arguments)
    for row in range(2):
        box = boxes[:, row : row + 1]
        alone = tiny_model.generate(**prompts(tiny_model, 1), pixel_values=pixel_values[:1], boxes=box, **arguments)
        assert torch.equal(alone[0], together[row])


BEAMS = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def prompt_of(model, num_images: int, length: int) -> tuple[list[int], list[int]]:
    """Ids and mask of a prompt with images among its words, padded on the left."""
    words = list(range(20, 20 + num_images))
    ids = [token for word in words for token in (*[model.config.image_token_id] * 4, word)] + [50]
    return [0] * (length - len(ids)) + ids, [0] * (length - len(ids)) + [1] * len(ids)


def assert_beams_as_alone(model, counts, inputs_of, **together):
    ids, masks = zip(*(prompt_of(model, count, 5 * max(counts) + 1) for count in counts))
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
    answers = model.generate(**batch, **together, **BEAMS)
    assert len(answers) == 2 * len(counts)
    for row in range(len(counts)):
        own = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        alone = model.generate(**own, **inputs_of(row), **BEAMS)
        assert torch.equal(alone, answers[2 * row : 2 * row + 2])
    return answers


@pytest.mark.parametrize("counts", [(2, 2), (1, 2), (2, 0, 1), (0, 3)])
def test_beams_see_the_images_of_their_own_prompt(tiny_model, counts):
    images = 3 * torch.randn(sum(counts), 3, 32, 32, generator=torch.Generator().manual_seed(4))
    starts = [sum(counts[:row]) for row in range(len(counts))]

    def inputs_of(row):
        return {"pixel_values": images[starts[row] : starts[row] + counts[row]]} if counts[row] else {}

    answers = assert_beams_as_alone(tiny_model, counts, inputs_of, pixel_values=images)
    other = assert_beams_as_alone(
        tiny_model,
        counts,
        lambda row: {n: v.flip(0) for n, v in inputs_of(row).items()},
        pixel_values=torch.cat([images[start : start + count].flip(0) for start, count in zip(starts, counts)]),
    )
    assert not torch.equal(answers, other)  # which tells the images apart


def test_beams_see_the_boxes_of_their_own_prompt(tiny_model, pixel_values):
    boxes = torch.tensor(
        [[[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 1.0, 1.0]], [[0.0, 0.5, 0.75, 1.0], [0.0, 0.0, 0.0, 0.0]]]
    )
    of_prompts = [(0, boxes[:1, :1]), (0, boxes[:1, 1:]), (1, boxes[1:, :1])]
    assert_beams_as_alone(
        tiny_model,
        (1, 1, 1),
        lambda row: {"pixel_values": pixel_values[of_prompts[row][0]][None], "boxes": of_prompts[row][1]},
        pixel_values=pixel_values[:2],
        boxes=boxes,
    )


def test_beams_refuse_images_that_do_not_fit_the_prompts(tiny_model, pixel_values):
    with pytest.raises(ValueError, match=r"holds 8 image placeholders, .* give 3 images or boxes; .* 12 in all"):
        tiny_model.generate(**prompts(tiny_model, 2), pixel_values=pixel_values, num_beams=2)


# Boxes and sizes.


def test_padding_boxes_embed_to_zero_and_change_nothing(tiny_model, pixel_values):
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.1, 0.1, 0.7, 0.9]], [[0.2, 0.2, 0.6, 0.5], [0.0, 0.0, 0.0, 0.0]]])
    embeds = tiny_model.get_image_features(pixel_values[:2], boxes).pooler_output
    assert embeds[1, 1].abs().max() == 0
    alone = tiny_model.get_image_features(pixel_values[1:2], boxes[1:, :1]).pooler_output
    torch.testing.assert_close(alone[0, 0], embeds[1, 0], rtol=0, atol=1e-5)
    whole = tiny_model.get_image_features(pixel_values[:1]).pooler_output
    torch.testing.assert_close(embeds[0, :1], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("vision", ["clip", "siglip2", "vit", "dinov2"])
def test_images_need_not_be_square(vision):
    model = build_model(vision)
    wide = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE * 2, generator=torch.Generator().manual_seed(0))
    tokens = model.get_image_features(wide).last_hidden_state
    assert tokens.shape == (1, 4, 32)
    model.pool_aggregator.output.weight.data.zero_()
    patches = model._patch_grid(wide)
    assert patches.shape == (1, 32, 4, 8)
    expected = patches[0, :, :2, :4].mean((1, 2))
    torch.testing.assert_close(model.get_image_features(wide).last_hidden_state[0, 0], expected)


# Composition.


@every_tower_pair
def test_a_fresh_model_pools_by_averages(vision, text, pixel_values):
    model = MMGEMModel.from_towers(*build_towers(vision, text), projection_dim=16, num_visual_tokens=4)
    grid = model._patch_grid(pixel_values)
    averages = F.adaptive_avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.get_image_features(pixel_values).last_hidden_state, averages)


@every_tower_pair
def test_from_towers_keeps_the_towers(vision, text, pixel_values, text_batch):
    vision_tower, language_model = build_towers(vision, text)
    model = MMGEMModel.from_towers(vision_tower, language_model, projection_dim=16, num_visual_tokens=4)
    assert model.config.image_token_id == 300  # a row of its own behind the vocabulary
    expected = language_model(**text_batch).logits
    torch.testing.assert_close(model(**text_batch).logits[..., :300], expected[..., :300])
    if vision != "siglip2":
        patches = vision_tower.eval()(pixel_values).last_hidden_state[:, -16:]
        torch.testing.assert_close(model._patch_grid(pixel_values).flatten(2).transpose(1, 2), patches)


def test_configs_of_the_towers_are_kept(tmp_path):
    model = build_model("dinov2_with_registers", "gemma2", num_embedding_tokens=3, embedding_pooling="mean")
    model.save_pretrained(tmp_path)
    loaded = MMGEMModel.from_pretrained(tmp_path)
    assert loaded.config.vision_config.to_dict()["num_register_tokens"] == 4
    assert loaded.config.num_embedding_tokens == 3
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, loaded.state_dict()[name]), name


def test_initial_temperature_is_that_of_clip(tiny_model):
    assert tiny_model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert tiny_model.logit_scale.item() < math.log(100)


def test_every_tower_config_is_tested():
    assert {pair[0] for pair in TOWERS} == set(VISION_CONFIGS)
    assert {pair[1] for pair in TOWERS} == set(TEXT_CONFIGS)


# Bad input.


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "`input_ids` and `pixel_values` are both None"),
        ({"pixel_values": torch.zeros(0, 3, 32, 32)}, r"`pixel_values` has shape \(0, 3, 32, 32\)"),
        ({"pixel_values": torch.zeros(2, 1, 32, 32)}, r"`pixel_values` has shape \(2, 1, 32, 32\); expected \(B, 3"),
        ({"pixel_values": torch.zeros(1, 3, 30, 32)}, "images of 30 x 32; expected multiples of the patch size 8 x 8"),
        ({"pixel_values": torch.zeros(1, 3, 32, 32), "boxes": torch.zeros(2, 1, 4)}, r"expected \(1, R, 4\)"),
        (
            {"pixel_values": torch.zeros(2, 3, 32, 32), "input_ids": torch.full((1, 4), 1)},
            "4 image placeholders, but .* give 2 images or boxes; expected 4 placeholders for each, 8 in all",
        ),
        (
            {"pixel_values": torch.zeros(2, 3, 32, 32), "input_ids": torch.full((3, 4), 5), "return_loss": True},
            "`pixel_values` holds 2 images and `input_ids` 3 texts; expected pairs",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32), "input_ids": torch.full((1, 4), 1), "return_loss": True},
            "image placeholders in texts that go with",
        ),
        (
            {
                "pixel_values": torch.zeros(1, 3, 32, 32),
                "input_ids": torch.full((1, 4), 5),
                "attention_mask": torch.ones(1, 3),
            },
            r"`attention_mask` has shape \(1, 3\); expected that of `input_ids`, \(1, 4\)",
        ),
        (
            {
                "pixel_values": torch.zeros(1, 3, 32, 32),
                "input_ids": torch.full((1, 4), 5),
                "labels": torch.full((1, 4), 5),
            },
            "`labels` came with images and texts that are only compared",
        ),
        (
            {
                "pixel_values": torch.zeros(1, 3, 32, 32),
                "input_ids": torch.full((1, 4), 5),
                "boxes": torch.ones(1, 1, 4),
            },
            "`boxes` came with images and texts that are only compared",
        ),
        (
            {
                "pixel_values": torch.zeros(1, 3, 32, 32),
                "input_ids": torch.full((1, 4), 5),
                "box_index": torch.tensor([0]),
                "return_loss": True,
            },
            r"`box_index` is \[0\], but `boxes` is None",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32), "input_ids": torch.full((1, 300), 5)},
            "301 tokens long; the language model takes at most 256",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(tiny_model, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**inputs)


def test_an_empty_batch_of_texts_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"`input_ids` has shape \(0, 4\)"):
        tiny_model.get_text_features(torch.zeros(0, 4, dtype=torch.long))


@pytest.mark.parametrize(
    "box",
    [[0.0, 0.0, 20.0, 20.0], [0.9, 0.9, 0.1, 0.1], [float("nan"), 0.0, 1.0, 1.0], [-0.1, 0.0, 1.0, 1.0]],
    ids=str,
)
def test_boxes_that_are_no_part_of_the_view_are_refused(tiny_model, pixel_values, box):
    with pytest.raises(ValueError, match=r"`boxes` has \[.*\]; expected .* in \[0, 1\] of the model's view"):
        tiny_model.get_image_features(pixel_values[:1], torch.tensor([[box]]))


@pytest.mark.parametrize("method", ["get_text_features", "get_multimodal_features", "forward", "generate"])
def test_placeholders_without_images_are_refused(tiny_model, method):
    n = tiny_model.config.num_visual_tokens
    input_ids = torch.tensor([[tiny_model.config.image_token_id] * n + [5, 6]])
    with pytest.raises(ValueError, match="`input_ids` holds image placeholders, but there are no `pixel_values`"):
        getattr(tiny_model, method)(input_ids)


def test_boxes_without_images_are_refused(tiny_model):
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    with pytest.raises(ValueError, match="`boxes` came without `pixel_values`"):
        tiny_model.get_multimodal_features(torch.tensor([[5, 6]]), boxes=boxes)


def test_a_calibrator_that_would_be_lost_is_not_saved(tmp_path):
    model = build_model()
    model.calibrator = ModalityCalibrator(model.config.projection_dim, ["image", "text"])
    with pytest.raises(ValueError, match="`calibrated_modalities` .* is None, but the model has a calibrator"):
        model.save_pretrained(tmp_path)


def test_fields_of_an_output_are_set_as_the_library_sets_them(monkeypatch):
    logits, cache = torch.ones(1), torch.zeros(1)

    def filled() -> MMGEMOutput:
        output = MMGEMOutput(logits=logits, image_norm=None)
        output.text_norm, output.loss, output.of_no_field = cache, None, 1
        output["image_norm"] = cache
        return output

    found = filled()
    monkeypatch.delattr(MMGEMOutput, "__setattr__")
    assert [*found.items()] == [*filled().items()] == [("logits", logits), ("text_norm", cache), ("image_norm", cache)]
    assert vars(found) == vars(filled())


def test_the_signature_of_forward_is_at_hand():
    kept = MMGEMModel.forward.__signature__
    assert "logits_to_keep" in kept.parameters
    assert inspect.signature(MMGEMModel.forward) is kept
