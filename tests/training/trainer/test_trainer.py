import gc
import math
from types import SimpleNamespace

import pytest
import torch
from one_step import gradient_of_one_step, rows
from tiny_models import build_model
from transformers import Trainer, TrainerCallback

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.trainer.trainer import MMGEMTrainer, MMGEMTrainingArguments, count_caption_tokens


def assert_same_gradients(actual, expected, atol=1e-6):
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def arguments_in(folder, **kwargs):
    return MMGEMTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **kwargs)


@pytest.fixture(scope="module")
def plain_step(tiny_processor, tmp_path_factory):
    """The gradient of one step on all rows."""
    return gradient_of_one_step(tiny_processor, str(tmp_path_factory.mktemp("step")), per_device_train_batch_size=4)


def test_step_is_the_gradient_of_the_joint_loss(plain_step, tiny_processor):
    model = build_model()
    model(**MMGEMCollator(tiny_processor)(rows())).loss.backward()
    expected = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    assert_same_gradients(plain_step, expected)


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


@pytest.mark.parametrize("arguments", [{}, {"caption_loss_weight": 0.0}, {"grad_cache_chunk_size": 2}], ids=str)
def test_pairs_alone_are_trained(tiny_processor, tmp_path, arguments):
    """The match stage of CoMa: nothing is written."""
    nothing = {"captions_per_image": 0, "regions_per_image": 0, "questions_per_image": 0}
    collator = MMGEMCollator(tiny_processor, **nothing, match_captions_per_image=1)
    gradient = gradient_of_one_step(tiny_processor, str(tmp_path), data_collator=collator, **arguments)
    assert all(part.isfinite().all() for part in gradient.values())
    assert gradient["text_projection.weight"].any() and gradient["token_projection.1.weight"].any()


def test_cached_step_is_the_step(tiny_processor, tmp_path):
    arguments = {"per_device_train_batch_size": 4, "caption_loss_weight": 2.0, "contrastive_loss_weight": 0.5}
    expected = gradient_of_one_step(tiny_processor, str(tmp_path), **arguments)
    for chunk_size in (1, 3):  # four chunks, and two that are not alike
        cached = gradient_of_one_step(tiny_processor, str(tmp_path), grad_cache_chunk_size=chunk_size, **arguments)
        assert_same_gradients(cached, expected, atol=1e-5)


def test_cached_steps_accumulate_as_plain_ones_do(tiny_processor, tmp_path):
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    expected = gradient_of_one_step(tiny_processor, str(tmp_path), **arguments)
    cached = gradient_of_one_step(tiny_processor, str(tmp_path), grad_cache_chunk_size=1, **arguments)
    assert_same_gradients(cached, expected, atol=1e-5)


def test_checkpointed_step_is_the_step(plain_step, tiny_processor, tmp_path):
    arguments = {"per_device_train_batch_size": 4, "gradient_checkpointing": True}
    assert_same_gradients(gradient_of_one_step(tiny_processor, str(tmp_path), **arguments), plain_step)


@pytest.mark.slow
def test_compiled_step_is_the_step(tiny_processor, tmp_path):
    expected, compiled = (
        gradient_of_one_step(
            tiny_processor, str(tmp_path), model=build_model(layers=1), per_device_train_batch_size=4, **arguments
        )
        for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"})
    )
    assert_same_gradients(compiled, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("weightless", "idle", "busy"),
    [
        ("caption_loss_weight", ["token_projection.3.weight"], ["text_projection.weight", "embedding_tokens"]),
        ("contrastive_loss_weight", ["text_projection.weight", "logit_scale"], ["token_projection.3.weight"]),
    ],
)
def test_a_loss_without_weight_moves_nothing(tiny_processor, tmp_path, weightless, idle, busy):
    arguments = {"per_device_train_batch_size": 4, weightless: 0.0}
    gradients = gradient_of_one_step(tiny_processor, str(tmp_path), **arguments)
    assert all(gradients[name].abs().max() == 0 for name in idle)
    assert all(gradients[name].abs().max() > 1e-6 for name in busy)


def test_resumed_training_ends_where_uninterrupted_training_does(tiny_processor, tmp_path):
    def train(folder, resume=None):
        model = build_model()
        arguments = arguments_in(folder, max_steps=3, per_device_train_batch_size=2, save_steps=2, learning_rate=1e-3)
        trainer = MMGEMTrainer(model, arguments, processing_class=tiny_processor, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    uninterrupted = train(tmp_path)
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    for name, parameter in uninterrupted.items():
        torch.testing.assert_close(resumed[name], parameter, rtol=0, atol=1e-6)


def test_logs_hold_both_losses_and_the_temperature(tiny_processor, tmp_path):
    model = build_model()
    arguments = arguments_in(tmp_path, max_steps=2, per_device_train_batch_size=4, logging_steps=2, save_strategy="no")
    trainer = MMGEMTrainer(model, arguments, processing_class=tiny_processor, train_dataset=rows())
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["caption_loss"] + first["contrastive_loss"] == pytest.approx(first["loss"], rel=1e-4)
    assert first["temperature"] == pytest.approx(0.07, rel=0.05)
    assert first["effective_batch_size"] == 4
    assert first["contrastive_queries"] == 6  # a caption each, and two of regions


def test_figures_of_images_are_not_logged_where_there_are_none(tiny_processor, tmp_path):
    arguments = arguments_in(tmp_path, max_steps=1, logging_steps=1, save_strategy="no")
    texts = [{"text": "a star"}, {"text": "a circle"}]
    trainer = MMGEMTrainer(build_model(), arguments, processing_class=tiny_processor, train_dataset=texts)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["caption_loss"] > 0 and not {"image_norm", "text_norm"} & set(first)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_logs_count_what_accumulation_adds_up(tiny_processor, tmp_path, chunk_size):
    model = build_model()
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    arguments |= {"max_steps": 1, "save_strategy": "no", "grad_cache_chunk_size": chunk_size}
    trainer = MMGEMTrainer(model, arguments_in(tmp_path, **arguments), tiny_processor, train_dataset=rows())
    with torch.no_grad():
        pixel_values = MMGEMCollator(tiny_processor)(rows())["pixel_values"]
        norm = model.get_image_features(pixel_values).pooler_output.norm(dim=-1).mean().item()
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["effective_batch_size"] == 4
    assert first["caption_loss"] + first["contrastive_loss"] == pytest.approx(first["loss"], rel=1e-4)
    assert first["image_norm"] == pytest.approx(norm, rel=1e-4)


def test_temperature_stays_within_its_bounds(tiny_processor, tmp_path):
    model = build_model()
    model.logit_scale.data.fill_(math.log(100) + 1)
    arguments = arguments_in(tmp_path, max_steps=1, per_device_train_batch_size=4, save_strategy="no")
    MMGEMTrainer(model, arguments, processing_class=tiny_processor, train_dataset=rows()).train()
    assert model.logit_scale.item() <= math.log(100) + 1e-6


def test_negative_loss_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match="caption_loss_weight.*-1"):
        arguments_in(tmp_path, caption_loss_weight=-1.0)


@pytest.mark.parametrize(
    ("instructions", "bf16", "is_slow"),
    [({"amx_bf16": False, "avx512_bf16": True}, True, False), ({"avx512_bf16": False}, True, True)]
    + [({"avx512_bf16": False}, False, False), ({"sve": True}, True, False)],
)
def test_a_processor_that_only_imitates_bf16_is_told(tmp_path, monkeypatch, caplog, instructions, bf16, is_slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True} | instructions)
    MMGEMTrainingArguments(str(tmp_path), bf16=bf16, use_cpu=True, report_to="none")
    assert ("`bf16` is True, for which this processor has no instructions" in caplog.text) == is_slow


def test_a_batch_of_one_has_nothing_to_tell_apart(tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size.*expected 2 or more"):
        arguments_in(tmp_path, per_device_train_batch_size=1)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_no_number_stops_the_run_and_names_the_rows(tiny_processor, tmp_path, chunk_size):
    model = build_model()
    data = [row | {"row_key": f"photos:{number}"} for number, row in enumerate(rows())]
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 1, "learning_rate": 1e-3}
    arguments |= {"train_sampling_strategy": "sequential", "grad_cache_chunk_size": chunk_size}
    trainer = MMGEMTrainer(model, arguments_in(tmp_path, **arguments), tiny_processor, train_dataset=data)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                model.text_projection.weight.data[0, 0] = math.nan

    trainer.add_callback(Poison())
    with pytest.raises(FloatingPointError, match="step 2 is nan.*photos:2, photos:3.*checkpoint-1") as caught:
        trainer.train()
    assert "photos:0" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert math.isfinite(MMGEMModel.from_pretrained(tmp_path / "checkpoint-1").text_projection.weight.sum())


def test_a_gradient_that_is_no_number_stops_the_run(tiny_processor, tmp_path):
    model = build_model()
    model.text_projection.weight.register_hook(lambda gradient: gradient * math.inf)
    arguments = arguments_in(tmp_path, max_steps=2, per_device_train_batch_size=4)
    before = model.text_projection.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="the gradient of step 1"):
        MMGEMTrainer(model, arguments, tiny_processor, train_dataset=rows()).train()
    torch.testing.assert_close(model.text_projection.weight, before)


@pytest.mark.parametrize(
    ("chunk_size", "advice"),
    [(None, "set `grad_cache_chunk_size` below.*[(]4[)]"), (2, "`grad_cache_chunk_size` [(]2[)]")],
)
def test_a_step_that_does_not_fit_says_what_to_lower(tiny_processor, tmp_path, monkeypatch, chunk_size, advice):
    model = build_model()

    def too_large(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: not enough memory: you tried ...")

    monkeypatch.setattr(model.text_projection, "forward", too_large)
    arguments = arguments_in(tmp_path, max_steps=1, per_device_train_batch_size=4, grad_cache_chunk_size=chunk_size)
    with pytest.raises(MemoryError, match=advice):
        MMGEMTrainer(model, arguments, tiny_processor, train_dataset=rows()).train()


@pytest.mark.parametrize(("bos", "eos"), [(5, 0), (None, [0, 9]), (None, None)])
def test_counted_tokens_are_those_the_model_divides_by(bos, eos, pixel_values):
    model = build_model()
    model.config.text_config.bos_token_id, model.config.text_config.eos_token_id = bos, eos
    input_ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0], [6, 7, 8, 9]])
    labels = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 0], [-100, -100, 8, 9]])
    batch = {
        "input_ids": torch.cat([input_ids, input_ids[:2]]),
        "labels": torch.cat([labels, labels[:2]]),
        "attention_mask": torch.ones(5, 4, dtype=torch.long),
        "image_index": torch.tensor([0, 1, 2, -1, -1]),
        "pixel_values": pixel_values,
        "return_loss": True,
    }
    mean = model(**batch).caption_loss
    count = count_caption_tokens(batch, model.config)
    torch.testing.assert_close(model(**batch, num_items_in_batch=count).caption_loss, mean)


def test_end_tokens_are_counted_once():
    input_ids = torch.tensor([[5, 6, 7], [5, 6, 0], [5, 6, 7], [5, 6, 7]])
    labels = torch.tensor([[5, 6, 7], [5, 6, 0], [-100, -100, 7], [-100, -100, -100]])
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}
    batch["pixel_values"], config = torch.zeros(4, 3, 8, 8), build_model().config
    config.text_config.eos_token_id = 0
    for image_index, expected in (([0, 1, 2, 3], 4 + 3 + 2 + 0), ([0, 1, 2, -1], 9), ([-1, 1, 2, 3], 8)):
        columns = {"image_index": torch.tensor(image_index), "contrastive_mask": torch.zeros(4, dtype=torch.bool)}
        assert count_caption_tokens(batch | columns, config) == expected


def test_evaluation_judges_captions_where_a_judge_is_given(tiny_processor, tmp_path):
    data = list(SceneDataset(3, 2, image_size=48, columns=("image", "captions")))
    for judge in (None, SCENE_JUDGE):
        trainer = MMGEMTrainer(
            build_model(), arguments_in(tmp_path), tiny_processor, caption_judge=judge, eval_dataset=data
        )
        figures = trainer.evaluate()
        assert ("eval_caption_fidelity" in figures) == (judge is not None)
        assert "eval_text_to_image_recall@1" in figures


@pytest.mark.parametrize("workers", [0, 1])
def test_collections_of_garbage_copy_no_memory_that_workers_share(monkeypatch, workers):
    monkeypatch.setattr(Trainer, "train", lambda trainer: gc.get_freeze_count())
    gc.unfreeze()
    trainer = object.__new__(MMGEMTrainer)
    trainer.args = SimpleNamespace(dataloader_num_workers=workers)
    assert (trainer.train() > 10_000) == bool(workers)
    assert gc.get_freeze_count() == 0
