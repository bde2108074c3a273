"""An exponential moving average of the weights, with which a run is evaluated and ends."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

EMA_WEIGHTS_NAME = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Averages the trained weights over the steps, in float32: after step t (from 1 on)

        average = d * average + (1 - d) * weights,    d = min(decay, (1 + t) / (10 + t)),

    so that the start is soon forgotten, as in TensorFlow's `ExponentialMovingAverage` and in diffusers (the average
    itself: Polyak & Juditsky 1992, https://epubs.siam.org/doi/10.1137/0330046). Training does not notice. At its end
    the averages are the model's weights; of a run with `load_best_model_at_end` those of its best checkpoint.

    Whoever writes and reads checkpoints calls [`save`] and [`load`]: callbacks hear of a checkpoint when it is past,
    and never which one a run resumes from. It works under DDP and FSDP2.

    Args:
        decay: The decay, between 0 and 1; about 1 / (1 - decay) steps are averaged.

    Raises:
        ValueError: If `decay` is not between 0 and 1; at the start of training under FSDP1 or DeepSpeed ZeRO-3, whose
            parameters are not tensors with a shape, and if a run is resumed without [`load`].
    """

    def __init__(self, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"`decay` is {decay}; expected a number between 0 and 1, such as 0.999.")
        self.decay = decay
        self._averages: dict[str, torch.Tensor] = {}  # of the model's parameters, placed as they are
        self._step = 0  # after which they were taken
        self._should_save = False

    def save(self, folder: str | Path):
        """Write the averages into a checkpoint, as `ema.safetensors`. All processes call this, one of them writes."""
        tensors = {}
        for name, average in self._averages.items():
            # A sharded one is gathered by all processes together.
            whole = average.full_tensor() if isinstance(average, DTensor) else average
            if self._should_save:
                tensors[name] = whole.cpu().contiguous()
        if self._should_save:
            metadata = {"format": "pt", "step": str(self._step)}
            save_file(tensors, Path(folder) / EMA_WEIGHTS_NAME, metadata=metadata)

    def load(self, folder: str | Path, model: nn.Module):
        """Take the averages of a checkpoint, to resume from it.

        Args:
            folder: The folder of the checkpoint.
            model: The model as the Trainer holds it, prepared for training.

        Raises:
            FileNotFoundError: If the checkpoint holds no averages.
            ValueError: If they are not those of the parameters that train in `model`.
        """
        path = Path(folder) / EMA_WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"`folder` is {str(folder)!r}, without {EMA_WEIGHTS_NAME}; expected a checkpoint of a run with an "
                "average of the weights."
            )
        parameters = trained_parameters(model)
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
            for name in sorted(shapes.keys() | expected.keys()):
                if shapes.get(name) != expected.get(name):
                    raise ValueError(
                        f"{str(path)!r} holds `{name}` as {shapes.get(name)}; expected {expected.get(name)}, as it "
                        "trains."
                    )
            self._averages = {name: _placed(file.get_tensor(name), like) for name, like in parameters.items()}
            self._step = int(file.metadata()["step"])

    @contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """Enter a context in which the averages are the model's weights; before training, when there are none, it does
        nothing."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if name in self._averages}
        trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.copy_to(model)
        try:
            yield
        finally:
            _copy(trained, parameters)

    def copy_to(self, model: nn.Module):
        """Make the averages the model's weights."""
        _copy(self._averages, dict(model.named_parameters()))

    def on_train_begin(self, args, state, control, model, **kwargs):
        self._should_save = args.should_save
        if state.global_step == 0:
            self._averages = {
                name: parameter.detach().to(torch.float32, copy=True)
                for name, parameter in trained_parameters(model).items()
            }
            self._step = 0
        elif state.global_step != self._step:
            raise ValueError(
                f"training goes on after step {state.global_step}, but the average of the weights is that of step "
                f"{self._step}; expected a call of `EMACallback.load` with the folder of the checkpoint."
            )

    def on_step_end(self, args, state, control, model, **kwargs):
        self._step = state.global_step
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        move_averages(self._averages, dict(model.named_parameters()), decay)

    def on_train_end(self, args, state, control, model, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(state.best_model_checkpoint, model)
        self.copy_to(model)


@torch.no_grad()
def move_averages(averages: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter], decay: float) -> None:
    """Move each average towards its parameter: average = decay * average + (1 - decay) * parameter.

    Args:
        averages: By name, changed in place; sharded as its parameter is, or whole.
        parameters: By name; at least those of the averages.
        decay: The share of an average that stays, in [0, 1].
    """
    for name, average in averages.items():
        parameter = parameters[name].detach()
        if isinstance(parameter, DTensor) and not isinstance(average, DTensor):
            parameter = parameter.full_tensor()
        average.lerp_(parameter.to(average.dtype), 1 - decay)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name.

    Raises:
        ValueError: If FSDP1 or DeepSpeed ZeRO-3 keeps them in shards without a shape.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("the model is wrapped by FSDP1; expected FSDP2 (`fsdp_version: 2`) to average its weights.")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError("the model is sharded by DeepSpeed ZeRO-3; expected ZeRO-2 or FSDP2 to average its weights.")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }


def _placed(tensor: torch.Tensor, like: nn.Parameter) -> torch.Tensor:
    """A whole tensor on the device, and sharded in the way, of a parameter."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


@torch.no_grad()
def _copy(source: dict[str, torch.Tensor], target: dict[str, nn.Parameter]):
    for name, tensor in source.items():
        target[name].copy_(tensor)
