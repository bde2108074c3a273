import math

import pytest
import reconstruction_step
import torch
from one_step import rows
from reconstruction_step import OPTIONS, gradient_of_one_step, parts, seeded_rows
from tiny_models import build_model
from torchrun import assert_both_step, run_on_two

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.recipes.recipe import Stage
from mmgem.training.recipes.stage_kinds import stage_kind
from mmgem.training.reconstruction.masking import MaskingCollator, Reconstruction
from mmgem.training.reconstruction.model import MMGEMForReconstruction
from mmgem.training.reconstruction.trainer import USED_PARTS, ReconstructionTrainer
from mmgem.training.trainer.arguments import MMGEMTrainingArguments


def bidirectional():
    return build_model(text_attention="bidirectional")


def arguments_in(folder, **kwargs):
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "contrastive_loss_weight": 0.0}
    return MMGEMTrainingArguments(output_dir=str(folder), **fixed, **kwargs)


def assert_same(actual, expected):
    assert sum(value.abs().max() > 1e-4 for value in expected.values()) > 50
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_is_the_gradient_of_both_losses(tiny_processor, tmp_path):
    gradients = gradient_of_one_step(tiny_processor, tmp_path, [seeded_rows()], 1)
    torch.manual_seed(0)
    model = MMGEMForReconstruction.from_model(bidirectional())
    batch = MaskingCollator(MMGEMCollator(tiny_processor), model.config, OPTIONS)(seeded_rows())
    outputs = model(**batch)
    (outputs.text_loss + 0.5 * outputs.patch_loss).backward()
    expected = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}
    expected |= {"text_loss": outputs.text_loss.detach(), "patch_loss": outputs.patch_loss.detach()}
    expected["effective_batch_size"] = torch.tensor(4.0)
    assert_same(gradients, expected)
    for name, gradient in gradients.items():
        assert name.partition(".")[0] in (*USED_PARTS, "loss", *ReconstructionTrainer.FIGURES) or not gradient.any()


@pytest.mark.parametrize("case", parts())
def test_accumulated_steps_are_one_of_all_rows(tiny_processor, tmp_path, case):
    expected = gradient_of_one_step(tiny_processor, tmp_path, parts()[case], 2)
    accumulated = gradient_of_one_step(tiny_processor, tmp_path, parts()[case], 1, gradient_accumulation_steps=2)
    assert_same(accumulated, expected)


@pytest.fixture(scope="module")
def folder(tiny_processor, tmp_path_factory):
    return run_on_two(reconstruction_step, tiny_processor, tmp_path_factory.mktemp("two_processes"))


@pytest.mark.slow
@pytest.mark.parametrize("case", parts())
def test_two_processes_step_as_one(folder, tiny_processor, tmp_path, case):
    assert_both_step(folder, case, gradient_of_one_step(tiny_processor, tmp_path, parts()[case], 2))


@pytest.mark.parametrize("setting", [{"gradient_checkpointing": True}, {"ema_decay": 0.5}])
def test_settings_of_the_trainer_hold(tiny_processor, tmp_path, setting):
    expected = gradient_of_one_step(tiny_processor, tmp_path, [seeded_rows()], 1)
    actual = gradient_of_one_step(tiny_processor, tmp_path, [seeded_rows()], 1, **setting)
    if "ema_decay" in setting:  # after one step the average is 2/11 of the start and 9/11 of the step
        expected = {name: value * (1 if value.ndim == 0 else 9 / 11) for name, value in expected.items()}
        expected = {name: value for name, value in expected.items() if value.ndim}
    assert_same(actual, expected)


def test_resumed_training_ends_where_uninterrupted_training_does(tiny_processor, tmp_path):
    def train(resume=None):
        torch.manual_seed(0)
        arguments = arguments_in(
            tmp_path, max_steps=4, per_device_train_batch_size=3, save_steps=2, learning_rate=1e-2
        )
        trainer = ReconstructionTrainer(bidirectional(), arguments, tiny_processor, train_dataset=seeded_rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    uninterrupted = train()
    resumed = train(str(tmp_path / "checkpoint-2"))
    assert "reconstruction_head.mask_patch" in uninterrupted
    for name, parameter in uninterrupted.items():
        torch.testing.assert_close(resumed[name], parameter, rtol=0, atol=1e-6)


def test_the_model_in_training_is_evaluated_as_any_other(tiny_processor, tmp_path):
    data = [row | {"scene_id": number} for number, row in enumerate(rows())]
    arguments = arguments_in(tmp_path, max_steps=1, per_device_train_batch_size=2, save_strategy="no")
    trainer = ReconstructionTrainer(bidirectional(), arguments, tiny_processor, train_dataset=data, eval_dataset=data)
    assert 0 <= trainer.evaluate()["eval_text_to_image_recall@1"] <= 1


def test_lora_trains_the_head_and_leaves_a_plain_model(tiny_processor, tmp_path):
    arguments = arguments_in(
        tmp_path, max_steps=2, per_device_train_batch_size=3, save_strategy="no", lora={"r": 2}, learning_rate=0.01
    )
    model = bidirectional()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = ReconstructionTrainer(model, arguments, tiny_processor, train_dataset=seeded_rows())
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert any("reconstruction_head" in name for name in trained) and any("lora_" in name for name in trained)
    assert not any("text_projection" in name or "embedding_tokens" in name for name in trained)
    trainer.train()
    kind = stage_kind(Stage(name="first", train_data=[], training={}, kind="reconstruction"))
    after = dict(kind.released(trainer.model).named_parameters())
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in moved
    assert moved and {name.partition(".")[0] for name in moved} <= {*USED_PARTS}


def test_no_number_stops_the_run_and_names_the_rows(tiny_processor, tmp_path):
    model = bidirectional()
    model.token_projection[1].weight.data[0, 0] = math.nan
    data = [row | {"row_key": f"photos:{number}"} for number, row in enumerate(seeded_rows())]
    arguments = arguments_in(tmp_path, max_steps=1, per_device_train_batch_size=6)
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan.*photos:"):
        ReconstructionTrainer(model, arguments, tiny_processor, train_dataset=data).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contrastive_objective": {"hardness": 9.0}}, "`contrastive_objective` is .*expected None"),
        ({"grad_cache_chunk_size": 2}, "`grad_cache_chunk_size` is 2"),
        ({"train_only": ["text_projection"]}, "nothing is left to train; .*reconstruction_head"),
    ],
)
def test_arguments_without_a_meaning_are_refused(tiny_processor, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ReconstructionTrainer(bidirectional(), arguments_in(tmp_path, **arguments), tiny_processor)


def test_default_options_are_those_of_moca(tiny_processor, tmp_path):
    trainer = ReconstructionTrainer(bidirectional(), arguments_in(tmp_path), tiny_processor)
    assert trainer.options == Reconstruction(text_mask_ratio=0.4, patch_mask_ratio=0.5, patch_loss_weight=0.1)
