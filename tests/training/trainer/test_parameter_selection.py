import pytest
import torch
from tiny_models import VISION_CONFIGS, build_model
from transformers import Trainer

from mmgem.training.trainer.lora import TOWERS, add_lora
from mmgem.training.trainer.parameter_selection import freeze_unused, own_name, parameter_groups, set_trainable

PARTS = {
    "vision_tower",
    "language_model",
    "pool_aggregator",
    "image_projection",
    "text_projection",
    "token_projection",
    "embedding_tokens",
    "logit_scale",
}


def parts_that_train(model) -> set[str]:
    return {own_name(name).split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def parts_with_gradient(model, pixel_values, text_batch) -> set[str]:
    model(pixel_values=pixel_values, **text_batch, return_loss=True).loss.backward()
    return {
        name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }


def groups_of(model, learning_rates=None, learning_rate=0.1, weight_decay=0.5):
    return parameter_groups(
        model, learning_rate, learning_rates, weight_decay, Trainer.get_decay_parameter_names(None, model)
    )


def rate_by_name(model, groups) -> dict[str, float]:
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}


def test_frozen_parts_get_no_gradient(pixel_values, text_batch):
    model = build_model()
    set_trainable(model, freeze=["vision_tower", "logit_scale"])
    assert parts_with_gradient(model, pixel_values, text_batch) == PARTS - {"vision_tower", "logit_scale"}


def test_only_named_parts_get_gradients(pixel_values, text_batch):
    model = build_model()
    set_trainable(model, train_only=["token_projection", "embedding_tokens"])
    assert parts_with_gradient(model, pixel_values, text_batch) == {"token_projection", "embedding_tokens"}


def test_names_reach_into_parts():
    model = build_model()
    set_trainable(model, freeze=["vision_tower.embeddings", "language_model.model.layers.1"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith(("vision_tower.embeddings.", "language_model.model.layers.1."))
    }
    assert frozen == expected != set()


def test_names_end_at_a_dot():
    layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(11))
    set_trainable(layers, freeze=["1"])
    assert parts_that_train(layers) == {str(number) for number in range(11)} - {"1"}


def test_every_call_starts_anew():
    model = build_model()
    set_trainable(model, train_only=["token_projection"])
    set_trainable(model, freeze=["vision_tower"])
    assert parts_that_train(model) == PARTS - {"vision_tower"}
    set_trainable(model)
    assert all(p.requires_grad for p in model.parameters())


def test_one_name_of_tied_weights_is_enough():
    model = build_model(text="llama")
    assert model.language_model.lm_head.weight is model.get_input_embeddings().weight
    set_trainable(model, freeze=["language_model.lm_head"])
    assert not model.get_input_embeddings().weight.requires_grad
    set_trainable(model, train_only=["language_model.lm_head"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "language_model.model.embed_tokens.weight"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": ["vision_towr"]}, "`freeze` has the unknown key `vision_towr`.*Did you mean `vision_tower`"),
        ({"train_only": ["vision_tower.embed"]}, "Did you mean `vision_tower.embeddings`"),
        ({"freeze": ["logit_scale"], "train_only": ["vision_tower"]}, "only one of them"),
        ({"freeze": sorted(PARTS)}, "leaves nothing to train"),
        ({"train_only": []}, "leaves nothing to train"),
    ],
)
def test_sets_that_make_no_sense_are_refused(arguments, message):
    model = build_model()
    with pytest.raises(ValueError, match=message):
        set_trainable(model, **arguments)
    assert all(p.requires_grad for p in model.parameters())


def test_a_single_name_is_not_taken_for_a_list():
    with pytest.raises(TypeError, match="`freeze` is 'vision_tower'; expected a list"):
        set_trainable(build_model(), freeze="vision_tower")


def test_of_lora_only_the_adapter_trains():
    model = add_lora(build_model(), ["language_model"], r=2)
    set_trainable(model, train_only=["language_model", "embedding_tokens"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {own_name(name).split(".")[0] for name in names} == {"language_model", "embedding_tokens"}
    assert all(".lora_" in name for name in names if "language_model" in name)

    set_trainable(model, freeze=["text_projection", "language_model.model.layers.0.self_attn"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("text_projection" in name or "layers.0.self_attn" in name for name in names)
    assert any("layers.0.mlp" in name for name in names) and any("token_projection" in name for name in names)
    assert not any("base_layer" in name or "original_module" in name or "vision_tower" in name for name in names)

    set_trainable(model)
    assert parts_that_train(model) == PARTS - {"vision_tower"}


def test_training_only_what_lora_leaves_out_is_refused():
    model = add_lora(build_model(), ["language_model"], r=2)
    with pytest.raises(ValueError, match="`train_only` names `vision_tower`, which has no LoRA"):
        set_trainable(model, train_only=["logit_scale", "vision_tower"])


@pytest.mark.parametrize("text", ["llama", "gpt2", "gemma3"])
def test_only_weights_decay(text):
    model = build_model("clip", text)
    groups = groups_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(groups, lr=1.0).step()
    kept = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    for name, p in model.named_parameters():
        if name not in kept:
            torch.testing.assert_close(p, before[name] * (1 - 0.1 * 0.5))
    # Zeros stay whatever happens to them, so of biases only the groups tell.
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    undecayed = {name for name, p in model.named_parameters() if id(p) in undecayed}
    assert {"logit_scale", "embedding_tokens"} <= kept & undecayed
    assert {name for name in before if "norm" in name or "ln_" in name or name.endswith("bias")} <= undecayed
    assert not undecayed & {"text_projection.weight", "vision_tower.encoder.layers.0.mlp.fc1.weight"}


def test_each_trained_parameter_is_in_one_group():
    model = build_model()
    set_trainable(model, freeze=["vision_tower"])
    grouped = [id(p) for group in groups_of(model, {"language_model": 0.01}) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_longest_name_gives_the_rate():
    model = build_model()
    rates = {"vision_tower": 0.01, "vision_tower.encoder.layers.1": "2e-2", "logit_scale": 1}
    groups = groups_of(model, rates)
    assert groups[0]["lr"] == 0.1  # which is the rate that the Trainer logs
    for name, rate in rate_by_name(model, groups).items():
        if name.startswith("vision_tower.encoder.layers.1."):
            assert rate == 0.02
        else:
            assert rate == {"vision_tower": 0.01, "logit_scale": 1}.get(name.split(".")[0], 0.1)


def test_rates_of_lora_weights():
    model = add_lora(build_model(), TOWERS, r=2)
    rates = rate_by_name(model, groups_of(model, {"vision_tower": 0.01, "token_projection": 0.02}))
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == {"vision_tower": 0.01, "token_projection": 0.02}.get(own_name(name).split(".")[0], 0.1)


@pytest.mark.parametrize(
    ("learning_rates", "error", "message"),
    [
        ({"visual_tower": 0.1}, ValueError, "`learning_rates` has the unknown key `visual_tower`.*`vision_tower`"),
        ({"vision_tower": 0.1}, ValueError, "`learning_rates` names `vision_tower`, where nothing trains"),
        ({"logit_scale": 0}, ValueError, "`logit_scale` the rate 0.0; expected more than 0"),
        ({"logit_scale": "high"}, TypeError, "`logit_scale` the rate 'high'; expected a number"),
        ({"logit_scale": None}, TypeError, "expected a number"),
    ],
)
def test_rates_that_make_no_sense_are_refused(learning_rates, error, message):
    model = build_model()
    set_trainable(model, freeze=["vision_tower"])
    with pytest.raises(error, match=message):
        groups_of(model, learning_rates)


UNUSED = {
    "clip": ["vision_tower.post_layernorm"],
    "siglip": ["vision_tower.head"],
    "siglip2": ["vision_tower.head"],
    "vit": ["vision_tower.pooler"],
    "dinov2": ["vision_tower.embeddings.mask_token"],
    "dinov2_with_registers": ["vision_tower.embeddings.mask_token"],
    "dinov3": ["vision_tower.embeddings.mask_token"],
}


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_unused_parameters_are_those_without_gradient(vision, text_batch, pixel_values):
    model = build_model(vision)
    frozen = freeze_unused(model)
    assert frozen == [name for name, _ in model.named_parameters() if name.startswith(tuple(UNUSED[vision]))]
    assert frozen == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model(**text_batch, pixel_values=pixel_values, return_loss=True).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert freeze_unused(model) == []


def test_nothing_else_about_the_model_changes():
    model = build_model("clip")
    model.vision_tower.encoder.requires_grad_(False)
    model.train()
    state, random_state = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    freeze_unused(model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.vision_tower.encoder.parameters())


def test_frozen_tower_is_not_run():
    model = build_model()
    model.vision_tower.requires_grad_(False)
    model.vision_tower.forward = None
    assert freeze_unused(model) == []
