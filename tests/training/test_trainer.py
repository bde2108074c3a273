import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_step import gradient_of_one_step, rows
from tiny_models import build_model

from mmgem.training.collator import MMGEMCollator
from mmgem.training.trainer import MMGEMTrainer, MMGEMTrainingArguments, count_caption_tokens

TESTS = Path(__file__).parent


def assert_same_gradients(actual, expected, atol=1e-6):
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def arguments_in(folder, **kwargs):
    return MMGEMTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **kwargs)


def test_step_is_the_gradient_of_the_joint_loss(tiny_processor, tmp_path):
    gradients = gradient_of_one_step(tiny_processor, str(tmp_path), per_device_train_batch_size=4)
    model = build_model()
    model(**MMGEMCollator(tiny_processor)(rows())).loss.backward()
    expected = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    assert_same_gradients(gradients, expected)


def test_accumulated_caption_loss_is_that_of_the_whole_batch(tiny_processor, tmp_path):
    arguments = {"contrastive_loss_weight": 0.0}
    whole = gradient_of_one_step(tiny_processor, str(tmp_path), per_device_train_batch_size=4, **arguments)
    accumulated = gradient_of_one_step(
        tiny_processor, str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, **arguments
    )
    assert_same_gradients(accumulated, whole)


def test_accumulated_contrastive_loss_is_the_mean_over_the_steps(tiny_processor, tmp_path):
    accumulated = gradient_of_one_step(
        tiny_processor,
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        caption_loss_weight=0.0,
        train_sampling_strategy="sequential",
    )
    model, collator = build_model(), MMGEMCollator(tiny_processor)
    data = rows()
    (sum(model(**collator(half)).contrastive_loss for half in (data[:2], data[2:])) / 2).backward()
    expected = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    assert_same_gradients(accumulated, expected)


@pytest.mark.slow
def test_two_processes_step_as_one_does(tiny_processor, tmp_path):
    tiny_processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(TESTS / "one_step.py"), str(tmp_path / "tokenizer"), str(tmp_path), "2"],
        env=environment,
        check=True,
        timeout=300,
    )
    expected = gradient_of_one_step(tiny_processor, str(tmp_path), per_device_train_batch_size=4)
    assert_same_gradients(torch.load(tmp_path / "gradient.pt"), expected)


def test_resumed_training_ends_where_uninterrupted_training_does(tiny_processor, tmp_path):
    def train(folder, resume=None):
        model = build_model()
        arguments = arguments_in(folder, max_steps=4, per_device_train_batch_size=2, save_steps=2, learning_rate=1e-3)
        trainer = MMGEMTrainer(model, arguments, processing_class=tiny_processor, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    uninterrupted = train(tmp_path)
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    for name, parameter in uninterrupted.items():
        torch.testing.assert_close(resumed[name], parameter, rtol=0, atol=1e-6)


def test_logs_hold_both_losses_and_the_temperature(tiny_processor, tmp_path):
    model = build_model()
    arguments = arguments_in(tmp_path, max_steps=4, per_device_train_batch_size=4, logging_steps=2, save_strategy="no")
    trainer = MMGEMTrainer(model, arguments, processing_class=tiny_processor, train_dataset=rows())
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["caption_loss"] + first["contrastive_loss"] == pytest.approx(first["loss"], rel=1e-4)
    assert first["temperature"] == pytest.approx(0.07, rel=0.05)


def test_temperature_stays_within_its_bounds(tiny_processor, tmp_path):
    model = build_model()
    model.logit_scale.data.fill_(math.log(100) + 1)
    arguments = arguments_in(tmp_path, max_steps=1, per_device_train_batch_size=4, save_strategy="no")
    MMGEMTrainer(model, arguments, processing_class=tiny_processor, train_dataset=rows()).train()
    assert model.logit_scale.item() <= math.log(100) + 1e-6


def test_negative_loss_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match="caption_loss_weight.*-1"):
        arguments_in(tmp_path, caption_loss_weight=-1.0)


@pytest.mark.parametrize(("bos", "eos"), [(5, 0), (None, [0, 9]), (None, None)])
def test_counted_tokens_are_those_the_model_divides_by(bos, eos, pixel_values):
    model = build_model()
    model.config.text_config.bos_token_id, model.config.text_config.eos_token_id = bos, eos
    input_ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0], [6, 7, 8, 9]])
    labels = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0], [-100, -100, 8, 9]])
    batch = {"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values, "return_loss": True}
    mean = model(**batch).caption_loss
    count = count_caption_tokens(input_ids, labels, eos, bos)
    torch.testing.assert_close(model(**batch, num_items_in_batch=count).caption_loss, mean)


def test_end_tokens_are_counted_once():
    input_ids = torch.tensor([[5, 6, 7], [5, 6, 0], [5, 6, 7], [5, 6, 7]])
    labels = torch.tensor([[5, 6, 7], [5, 6, 0], [-100, -100, 7], [-100, -100, -100]])
    assert count_caption_tokens(input_ids, labels, eos_token_id=0) == 4 + 3 + 2 + 0
