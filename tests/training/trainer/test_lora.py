import fresh_process
import pytest
import torch
from one_step import rows
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny_models import build_model

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.lora import TOWERS, MMGEMPeftModel, add_lora, merge_lora
from mmgem.training.trainer.parameter_selection import own_name
from mmgem.training.trainer.trainer import MMGEMTrainer

BLOCKS = {
    "clip": ("vision_tower.encoder.layers", "self_attn", "q_proj k_proj v_proj out_proj", "fc1 fc2"),
    "dinov2": ("vision_tower.encoder.layer", "attention", "q_proj k_proj v_proj o_proj", "fc1 fc2"),
    "llama": (
        "language_model.model.layers",
        "self_attn",
        "q_proj k_proj v_proj o_proj",
        "gate_proj up_proj down_proj",
    ),
    "gpt2": ("language_model.transformer.h", "attn", "c_attn c_proj", "c_fc c_proj"),
}
BLOCKS["siglip"] = BLOCKS["siglip2"] = BLOCKS["clip"]


def layers_of(tower: str) -> set[str]:
    blocks, attention, in_attention, in_mlp = BLOCKS[tower]
    layers = [f"{attention}.{name}" for name in in_attention.split()] + [f"mlp.{name}" for name in in_mlp.split()]
    return {f"{blocks}.{number}.{layer}" for number in range(2) for layer in layers}


def adapted_layers(model) -> set[str]:
    return {own_name(name) for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def shaken(model, scale=0.1):
    """Every trained parameter moved, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.no_grad()
def outputs_of(model, pixel_values, text_batch) -> dict[str, torch.Tensor]:
    placeholders = torch.full((3, 4), 1)
    prompt = {name: torch.cat([torch.ones_like(placeholders), ids], 1) for name, ids in text_batch.items()}
    joint = model(pixel_values=pixel_values, **text_batch, return_loss=True)
    return {
        "images": model.get_image_features(pixel_values).pooler_output,
        "texts": model.get_text_features(**text_batch).pooler_output,
        "logits": model(pixel_values=pixel_values, **prompt).logits,
        "similarities": joint.logits_per_image,
        "loss": joint.loss,
    }


def assert_same(actual, expected, atol):
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def trainer_of(model, processor, folder, **arguments) -> MMGEMTrainer:
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-2} | arguments
    arguments = MMGEMTrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **arguments
    )
    return MMGEMTrainer(model, arguments, processing_class=processor, train_dataset=rows())


@pytest.mark.parametrize(
    ("vision", "text"), [("clip", "llama"), ("siglip", "gpt2"), ("dinov2", "llama"), ("siglip2", "gpt2")]
)
def test_adapters_are_on_the_linear_layers_of_the_blocks(vision, text):
    assert adapted_layers(add_lora(build_model(vision, text), TOWERS)) == layers_of(vision) | layers_of(text)
    assert adapted_layers(add_lora(build_model(vision, text))) == layers_of(text)


def test_layers_can_be_chosen():
    model = add_lora(build_model("clip"), ["vision_tower"], target_modules=["q_proj", "fc1"])
    assert adapted_layers(model) == {name for name in layers_of("clip") if name.endswith(("q_proj", "fc1"))}


def test_a_fresh_adapter_changes_nothing(pixel_values, text_batch):
    expected = outputs_of(build_model(), pixel_values, text_batch)
    assert_same(outputs_of(add_lora(build_model(), TOWERS).eval(), pixel_values, text_batch), expected, atol=0)


@pytest.mark.parametrize(("tower", "changed"), [("vision_tower", "images"), ("language_model", "texts")])
def test_the_adapter_of_a_tower_changes_its_embeddings(tower, changed, pixel_values, text_batch):
    expected = outputs_of(build_model(), pixel_values, text_batch)
    model = add_lora(build_model(), [tower], r=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    actual = outputs_of(shaken(model), pixel_values, text_batch)
    is_changed = {name: not torch.allclose(actual[name], expected[name], atol=1e-3) for name in expected}
    assert is_changed == {"images": False, "texts": False, "logits": True, "similarities": True, "loss": True} | {
        changed: True
    }


def test_all_that_trains_gets_gradients_and_the_towers_do_not_train(pixel_values, text_batch):
    model = shaken(add_lora(build_model(), TOWERS))
    model(pixel_values=pixel_values, **text_batch, return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        in_adapter = ".lora_" in name or not own_name(name).startswith(TOWERS)
        assert parameter.requires_grad == (in_adapter and ".original_module." not in name), name
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_what_was_frozen_beside_the_towers_stays_frozen():
    model = build_model()
    model.logit_scale.requires_grad_(False)
    model.token_projection[0].requires_grad_(False)
    trained = {own_name(name) for name, p in add_lora(model).named_parameters() if p.requires_grad}
    assert not trained & {"logit_scale", "token_projection.0.weight", "token_projection.0.bias"}
    assert {"embedding_tokens", "token_projection.1.weight"} <= trained


@pytest.mark.parametrize(("vision", "text"), [("siglip", "llama"), ("dinov2", "gpt2"), ("dinov3", "gemma3")])
def test_plain_peft_loads_what_was_saved(vision, text, pixel_values, text_batch, tmp_path):
    model = shaken(add_lora(build_model(vision, text), TOWERS, r=4))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_model(vision, text), tmp_path)
    assert_same(outputs_of(loaded, pixel_values, text_batch), outputs_of(model, pixel_values, text_batch), atol=0)
    assert torch.equal(loaded.logit_scale, model.logit_scale)
    assert torch.equal(loaded.embedding_tokens, model.embedding_tokens)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_saved_adapter_can_be_trained_on(tmp_path):
    model = shaken(add_lora(build_model(), TOWERS, r=4))
    model.save_pretrained(tmp_path / "first")
    loaded = MMGEMPeftModel.from_pretrained(build_model(), tmp_path / "first", is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
    shaken(loaded).save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(build_model(), tmp_path / "second")
    assert torch.equal(again.logit_scale, loaded.logit_scale)


@pytest.mark.parametrize("fields", [{"r": 4}, {"r": 4, "use_dora": True, "lora_alpha": 2, "use_rslora": True}])
@pytest.mark.parametrize("text", ["llama", "gpt2"])
def test_merged_model_is_one_as_any_other(text, fields, pixel_values, text_batch, tmp_path):
    model = shaken(add_lora(build_model(text=text), TOWERS, **fields))
    expected = outputs_of(model, pixel_values, text_batch)
    merged = merge_lora(model)
    assert type(merged) is MMGEMModel
    assert merged.state_dict().keys() == build_model(text=text).state_dict().keys()
    assert all(p.requires_grad for p in merged.parameters())
    assert_same(outputs_of(merged, pixel_values, text_batch), expected, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*"))
    loaded = MMGEMModel.from_pretrained(tmp_path)
    assert_same(outputs_of(loaded, pixel_values, text_batch), expected, atol=1e-5)


def test_generates_what_the_merged_model_does(pixel_values):
    prompt = {
        "input_ids": torch.full((3, 4), 1),
        "pixel_values": pixel_values,
        "max_new_tokens": 8,
        "do_sample": False,
    }
    base = build_model().generate(**prompt)
    model = shaken(add_lora(build_model(), TOWERS, r=4), scale=0.3)
    generated = model.generate(**prompt)
    assert not torch.equal(generated, base)
    assert torch.equal(merge_lora(model).generate(**prompt), generated)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradients(use_reentrant, pixel_values, text_batch):
    def gradients(checkpointing):
        model = shaken(add_lora(build_model(), TOWERS, r=4))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.train()
        model(pixel_values=pixel_values, **text_batch, return_loss=True).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    actual, expected = gradients(True), gradients(False)
    for name, gradient in expected.items():
        assert actual[name] is not None, name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6)


def test_resumed_training_ends_where_uninterrupted_training_does(tiny_processor, tmp_path):
    def train(resume=None):
        torch.manual_seed(3)
        model = add_lora(build_model("dinov2"), TOWERS, r=4, lora_dropout=0.1)
        trainer_of(model, tiny_processor, tmp_path).train(resume_from_checkpoint=resume)
        return model.state_dict()

    uninterrupted = train()
    resumed = train(resume=str(tmp_path / "checkpoint-2"))
    for name, parameter in uninterrupted.items():
        torch.testing.assert_close(resumed[name], parameter, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"towers": ["vision"]}, ValueError, "`towers` has the unknown key `vision`.*Did you mean `vision_tower`"),
        ({"towers": []}, ValueError, "`towers` is empty"),
        ({"towers": "vision_tower"}, TypeError, "`towers` is 'vision_tower'; expected a list"),
        ({"target_modules": ["q_prj"]}, ValueError, "`target_modules` has the unknown key `q_prj`.*`q_proj`"),
        ({"target_modules": "all-linear"}, TypeError, "expected a list"),
        ({"target_modules": []}, ValueError, "`target_modules` is empty"),
        ({"lora_alfa": 8}, ValueError, "unknown key `lora_alfa`.*`lora_alpha`"),
        ({"bias": "all"}, ValueError, "unknown key `bias`"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        add_lora(build_model(), **arguments)


def test_models_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="`model` is MMGEMPeftModel; expected an MMGEMModel"):
        add_lora(add_lora(build_model()))
    with pytest.raises(TypeError, match="`model` is MMGEMModel; expected a model with LoRA"):
        merge_lora(build_model())


IN_A_FRESH_PROCESS = """
import sys
import torch
from peft import PeftModel
from mmgem.modeling_mmgem import MMGEMModel

folder = sys.argv[1]
model = PeftModel.from_pretrained(MMGEMModel.from_pretrained(f"{folder}/base"), f"{folder}/checkpoint-4")
inputs = torch.load(f"{folder}/inputs.pt")
with torch.no_grad():
    outputs = {
        "images": model.get_image_features(inputs["pixel_values"]).pooler_output,
        "texts": model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output,
        "similarities": model(**inputs).logits_per_image,
    }
torch.save(outputs, f"{folder}/outputs.pt")
"""


@pytest.mark.slow
def test_trained_adapter_loads_in_a_fresh_process(tiny_processor, pixel_values, text_batch, tmp_path):
    base = build_model()
    base.save_pretrained(tmp_path / "base")
    model = add_lora(base, TOWERS, r=4)
    trainer_of(model, tiny_processor, tmp_path).train()
    torch.save({"pixel_values": pixel_values, **text_batch}, tmp_path / "inputs.pt")
    fresh_process.run(IN_A_FRESH_PROCESS, tmp_path, cwd=tmp_path, installed=True)
    expected = outputs_of(model.eval(), pixel_values, text_batch)
    untrained = outputs_of(build_model(), pixel_values, text_batch)
    for name, value in torch.load(tmp_path / "outputs.pt").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
        assert not torch.allclose(value, untrained[name], atol=1e-4)
