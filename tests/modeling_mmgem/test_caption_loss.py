"""The caption loss taken in chunks of logits, against that of all logits at once."""

import pytest
import torch
from tiny_models import build_model

import mmgem.joint_step as joint_step


def loss_and_gradients(model, batch, bf16=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(**batch, return_loss=True).caption_loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch):
    """Rows of logits that the vocabulary head computed, call by call, and calls of `linear_cross_entropy`."""
    made = {"head": [], "linear_cross_entropy": 0}
    vocabulary_logits = joint_step.JointStep._vocabulary_logits
    linear_cross_entropy = joint_step.F.linear_cross_entropy

    def count_logits(self, hidden_states):
        made["head"].append(len(hidden_states))
        return vocabulary_logits(self, hidden_states)

    def count_fused(*args, **kwargs):
        made["linear_cross_entropy"] += 1
        return linear_cross_entropy(*args, **kwargs)

    monkeypatch.setattr(joint_step.JointStep, "_vocabulary_logits", count_logits)
    monkeypatch.setattr(joint_step.F, "linear_cross_entropy", count_fused)
    return made


@pytest.mark.parametrize("text", ["llama", "qwen3", "gpt2", "gemma2", "granite", "cohere"])
def test_chunks_change_neither_loss_nor_gradients(text, text_batch, pixel_values, monkeypatch, calls):
    model, batch = build_model("siglip", text), {**text_batch, "pixel_values": pixel_values}
    expected_loss, expected = loss_and_gradients(model, batch)
    assert calls["head"] == [18]  # 15 tokens, and an end token for each of the three captions
    calls["head"].clear()
    monkeypatch.setattr(joint_step, "LOGITS_AT_ONCE", 4 * 300)
    loss, gradients = loss_and_gradients(model, batch)

    is_matrix = text in ("llama", "qwen3", "gpt2")
    assert calls["linear_cross_entropy"] == is_matrix
    assert calls["head"] == ([] if is_matrix else [4, 4, 4, 4, 2] + [2, 4, 4, 4, 4])  # once more for the gradients
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_chunks_keep_the_loss_in_float32_under_autocast(text_batch, pixel_values, monkeypatch, calls):
    model, batch = build_model(), {**text_batch, "pixel_values": pixel_values}
    expected_loss, expected = loss_and_gradients(model, batch, bf16=True)
    monkeypatch.setattr(joint_step, "LOGITS_AT_ONCE", 4 * 300)
    loss, gradients = loss_and_gradients(model, batch, bf16=True)
    assert calls["linear_cross_entropy"] == 0
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0.05, atol=2e-3, msg=name)


def test_chunks_leave_a_frozen_head_alone(text_batch, pixel_values, monkeypatch):
    model = build_model("siglip", "qwen3")
    model.get_output_embeddings().requires_grad_(False)
    monkeypatch.setattr(joint_step, "LOGITS_AT_ONCE", 4 * 300)
    _, gradients = loss_and_gradients(model, {**text_batch, "pixel_values": pixel_values})
    assert "language_model.lm_head.weight" not in gradients
    assert gradients["language_model.model.norm.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("llama", "vocab_size", 300),
        ("granite", "logits_scaling", 3.0),
        ("cohere", "logit_scale", 0.25),
        ("gemma2", "final_logit_softcapping", 0.1),
    ],
)
def test_logits_of_single_states_are_those_of_the_language_model(text, name, value, text_batch):
    model = build_model("siglip", text).eval()
    for config in (model.config.text_config, model.language_model.config, model.language_model):
        if hasattr(config, name):
            setattr(config, name, value)
    states = model.language_model.get_decoder()(text_batch["input_ids"]).last_hidden_state[0]  # (L, H)
    expected = model.language_model(text_batch["input_ids"]).logits[0]
    torch.testing.assert_close(model._vocabulary_logits(states), expected)
