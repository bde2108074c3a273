import pytest
import sharded_ema
import torch
from safetensors.torch import load_file
from sharded_ema import Line, begun, one_step
from torch import nn
from torchrun import torchrun
from transformers import Trainer, TrainingArguments

from mmgem.training.trainer.lora import add_lora
from mmgem.training.trainer.parameter_selection import set_trainable
from mmgem.training.trainer.weight_average import EMA_WEIGHTS_NAME, EMACallback


class Training(Trainer):
    """Saves and loads the averages where a trainer does."""

    def __init__(self, folder, decay=0.9, ema=True, **arguments):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(16, 4, generator=generator)
        arguments = {"max_steps": 6, "save_steps": 2, "learning_rate": 0.1} | arguments
        super().__init__(
            Line(),
            TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=4,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                **arguments,
            ),
            train_dataset=(rows := [{"x": row, "y": row.sum()} for row in x]),
            eval_dataset=rows,
        )
        self.ema = EMACallback(decay) if ema else None
        if ema:
            self.add_callback(self.ema)

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.ema:
            self.ema.save(f"{self.args.output_dir}/checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.ema and checkpoint:
            self.ema.load(checkpoint, self.model)


def test_average_is_that_of_the_formula(tmp_path):
    model = Line()
    ema, arguments = begun(0.5, model, tmp_path)
    expected = model.linear.weight.detach().double()
    weights = torch.randn(12, 1, 4, generator=torch.Generator().manual_seed(2))
    for t, weight in enumerate(weights, start=1):
        one_step(ema, arguments, model, {"linear.weight": weight})
        decay = min(0.5, (1 + t) / (10 + t))  # 2/11, 3/12, ... and from t = 8 on 0.5
        expected = decay * expected + (1 - decay) * weight
    with ema.averaged(model):
        torch.testing.assert_close(model.linear.weight.double(), expected, rtol=0, atol=1e-6)


def test_without_warm_up_constant_weights_are_approached_geometrically(tmp_path):
    model = Line()
    nn.init.zeros_(model.linear.bias)
    ema, arguments = begun(0.1, model, tmp_path)  # (1 + t) / (10 + t) is more from the first step on
    for _ in range(5):
        one_step(ema, arguments, model, {"linear.bias": torch.ones(1)})
    with ema.averaged(model):
        assert model.linear.bias.item() == pytest.approx(1 - 0.1**5)


def test_weights_come_back_after_the_context_also_from_an_error(tmp_path):
    model = Line()
    ema, arguments = begun(0.9, model, tmp_path)
    one_step(ema, arguments, model, {"linear.bias": torch.tensor([5.0])})
    with pytest.raises(KeyError), ema.averaged(model):
        assert model.linear.bias.item() != 5
        raise KeyError
    assert model.linear.bias.item() == 5


def test_before_training_the_weights_are_the_average():
    model = Line()
    before = model.linear.weight.clone()
    with EMACallback(0.9).averaged(model):
        assert torch.equal(model.linear.weight, before)


def test_low_precision_weights_are_averaged_in_float32(tmp_path):
    model = Line().to(torch.bfloat16)
    nn.init.ones_(model.linear.bias)
    ema, arguments = begun(0.999, model, tmp_path)
    arguments[1].global_step = 100_000  # past the warm-up
    for _ in range(500):  # each moves the average by less than bfloat16 can tell from 1
        one_step(ema, arguments, model, {"linear.bias": torch.tensor([2.0])})
    ema.copy_to(model)
    assert model.linear.bias.item() == pytest.approx(2 - 0.999**500, abs=0.01)


def test_training_does_not_notice_and_ends_with_the_average(tmp_path):
    plain, averaged = Training(tmp_path / "plain", ema=False), Training(tmp_path / "averaged")
    plain.train()
    averaged.train()
    for step in (2, 4, 6):
        files = [tmp_path / name / f"checkpoint-{step}" / "model.safetensors" for name in ("plain", "averaged")]
        for name, weight in load_file(files[0]).items():
            assert torch.equal(load_file(files[1])[name], weight)
    averages = load_file(tmp_path / "averaged" / "checkpoint-6" / EMA_WEIGHTS_NAME)
    assert averages.keys() == {"linear.weight", "linear.bias"}
    for name, average in averages.items():
        assert torch.equal(averaged.model.get_parameter(name), average)
        assert not torch.equal(plain.model.get_parameter(name), average)


def test_resumed_training_ends_where_uninterrupted_training_does(tmp_path):
    uninterrupted, resumed = Training(tmp_path), Training(tmp_path)
    uninterrupted.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in uninterrupted.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), parameter)


def test_second_training_starts_a_new_average(tmp_path):
    twice, once = Training(tmp_path / "twice", save_strategy="no"), Training(tmp_path / "once", save_strategy="no")
    twice.train()
    once.model.load_state_dict(twice.model.state_dict())
    for training in (twice, once):
        training.optimizer = training.lr_scheduler = None
        training.train()
    assert torch.equal(twice.model.linear.weight, once.model.linear.weight)


def test_best_checkpoint_brings_its_own_average(tmp_path):
    training = Training(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    training.evaluate = lambda **_: {"eval_loss": training.state.global_step}
    training.train()
    assert training.state.best_model_checkpoint.endswith("checkpoint-2")
    averages = load_file(tmp_path / "checkpoint-2" / EMA_WEIGHTS_NAME)
    assert torch.equal(training.model.linear.weight, averages["linear.weight"])


def test_resuming_without_the_average_is_refused(tmp_path):
    Training(tmp_path).train()
    resumed = Training(tmp_path, ema=False)
    resumed.add_callback(EMACallback(0.9))
    with pytest.raises(ValueError, match="goes on after step 2, but the average of the weights is that of step 0"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpoint_of_another_run_is_refused(tmp_path):
    model = Line()
    with pytest.raises(FileNotFoundError, match="`folder` is .*without ema.safetensors"):
        EMACallback(0.9).load(tmp_path, model)
    begun(0.9, model, tmp_path)[0].save(tmp_path)
    model.linear.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"holds `linear.bias` as \(1,\); expected None"):
        EMACallback(0.9).load(tmp_path, model)
    model = Line()
    model.linear = nn.Linear(5, 1)
    with pytest.raises(ValueError, match=r"holds `linear.weight` as \(1, 4\); expected \(1, 5\)"):
        EMACallback(0.9).load(tmp_path, model)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 2])
def test_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"`decay` is {decay}"):
        EMACallback(decay)


def test_models_sharded_into_pieces_without_a_shape_are_refused(tmp_path):
    model = Line()
    model.linear.weight.ds_id = 0  # as DeepSpeed marks the parameters that ZeRO-3 has taken apart
    with pytest.raises(ValueError, match="ZeRO-3"):
        begun(0.9, model, tmp_path)


def test_of_lora_the_adapter_is_averaged(tiny_model, tmp_path):
    model = add_lora(tiny_model, r=2)
    set_trainable(model, train_only=["language_model", "logit_scale"])
    ema, arguments = begun(0.9, model, tmp_path)
    one_step(ema, arguments, model, {"base_model.model.logit_scale": torch.tensor(0.0)})
    ema.save(tmp_path)
    names = load_file(tmp_path / EMA_WEIGHTS_NAME).keys()
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    ema.copy_to(model)
    assert model.logit_scale.item() == pytest.approx(2 / 11 * tiny_model.config.logit_scale_init_value)


@pytest.mark.slow
def test_two_processes_average_as_one_does(tmp_path):
    torchrun(sharded_ema, tmp_path)
    model = Line()
    ema, arguments = begun(0.9, model, tmp_path)
    for value in (1.0, 2.0, 3.0):
        weights = {"linear.weight": torch.full((1, 4), value), "linear.bias": torch.full((1,), value)}
        one_step(ema, arguments, model, weights)
    ema.copy_to(model)
    for sharding in ("ddp", "fsdp2"):
        averages = load_file(tmp_path / sharding / EMA_WEIGHTS_NAME)
        assert averages.keys() == {"linear.weight", "linear.bias"}
        for name, average in averages.items():
            torch.testing.assert_close(average, model.get_parameter(name).detach(), rtol=0, atol=1e-6)
