"""transformers' own Trainer on the joint loss: the scale of its gradient, and what else it offers."""

import math

import pytest
import torch
from one_step import gradient_of_one_step, rows
from stock_step import collate, stock_gradient, stock_trainer
from tiny_models import build_model


def assert_same(actual: dict, expected: dict):
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("steps", [1, 4])
def test_gradient_is_that_of_the_loss_however_often_it_is_accumulated(tiny_processor, tmp_path, steps):
    gradients = stock_gradient(tiny_processor, tmp_path, [rows()] * steps, gradient_accumulation_steps=steps)
    model = build_model()
    model(**collate(tiny_processor, rows())).loss.backward()
    assert_same(gradients, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})


def test_accumulated_steps_weigh_by_their_tokens(tiny_processor, tmp_path):
    halves = [rows()[:2], rows()[2:]]
    gradients = stock_gradient(tiny_processor, tmp_path, halves, gradient_accumulation_steps=2)
    model = build_model()
    batches = [collate(tiny_processor, half) for half in halves]
    counts = [int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches]
    for batch, count in zip(batches, counts):
        (model(**batch).loss * count / sum(counts)).backward()
    # The tokens that the Trainer does not count are as many in each half as its texts, which is nearly made up for.
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-6, name


def test_the_best_model_is_found_by_its_loss(tiny_processor, tmp_path):
    model = build_model()
    trainer = stock_trainer(
        model,
        tiny_processor,
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=1e-3,
    )
    trainer.train()
    with torch.no_grad():
        loss = model.eval()(**collate(tiny_processor, rows())).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert math.isclose(trainer.state.best_metric, loss, rel_tol=1e-5)


def test_noise_that_depends_on_the_length_of_a_text_is_refused_by_name(tiny_processor, tmp_path):
    message = "`neftune_noise_alpha` is 5.0, .*; expected None"
    with pytest.raises(ValueError, match=message):
        stock_trainer(build_model(), tiny_processor, tmp_path, neftune_noise_alpha=5.0).train()
    with pytest.raises(ValueError, match=message):
        gradient_of_one_step(tiny_processor, str(tmp_path), neftune_noise_alpha=5.0)


def test_a_resized_vocabulary_is_saved_and_loaded(tiny_processor, tmp_path):
    model, batch = build_model(), collate(tiny_processor, rows())
    before = model(**batch)
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.text_config.vocab_size == again.get_output_embeddings().out_features == 320
    torch.testing.assert_close(again(**batch).text_embeds, before.text_embeds)
    assert again(input_ids=batch["input_ids"]).logits.shape[-1] == 320
