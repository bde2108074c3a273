"""The choice of the parameters that train, and of their learning rates, by the names of parts of the model:
`vision_tower`, `language_model.lm_head`, ..."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from mmgem.patch_grid import blank_image
from mmgem.training.argument_checks import check_keys

_PEFT_PREFIX = "base_model.model."
# What peft puts into names: `q_proj.base_layer.weight`, `image_projection.modules_to_save.default.1.weight`, ...
_PEFT_INFIX = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.)")


def own_name(name: str) -> str:
    """Return the name that a parameter of a PEFT model has in the model itself: `text_projection.weight`."""
    return _PEFT_INFIX.sub("", name.removeprefix(_PEFT_PREFIX))


def is_bare(name: str) -> bool:
    """Tell whether a parameter is the model's own, and of none of its modules: `logit_scale`, `embedding_tokens`."""
    return "." not in own_name(name)


def set_trainable(
    model: nn.Module, freeze: Sequence[str] | None = None, train_only: Sequence[str] | None = None
) -> None:
    """Choose the parameters that train: all but `freeze`, only `train_only`, or, with neither, all.

    Every call starts anew, so a stage of training undoes what the one before it froze. Of a model with LoRA (see
    [`mmgem.training.trainer.lora.add_lora`]) only the adapter ever trains: the LoRA weights, and copies of the modules
    beside the towers; `language_model` then stands for its LoRA weights. Of tied weights one name is enough. Frozen
    parts stay in the mode of the model: `model.train()` switches on their dropout, where their config has any.

    Args:
        model: An `MMGEMModel`, or one with LoRA.
        freeze: Names of parts (`vision_tower`, `pool_aggregator`, `image_projection`, `text_projection`,
            `token_projection`, `embedding_tokens`, `logit_scale`, `language_model`), or of modules and parameters
            inside them (`vision_tower.embeddings`).
        train_only: Names of the same kinds.

    Raises:
        TypeError: If the names are not a list.
        ValueError: If both are given, the model does not have a name, nothing trains under a name in `train_only`, or
            nothing is left to train.
    """
    if freeze is not None and train_only is not None:
        raise ValueError(
            f"`freeze` is {list(freeze)} and `train_only` is {list(train_only)}; expected only one of them."
        )
    argument, names = ("freeze", freeze or ()) if train_only is None else ("train_only", train_only)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"`{argument}` is {names!r}; expected a list of names of parts.")
    parameters = list(model.named_parameters(remove_duplicate=False))
    _check_names(argument, names, [own_name(name) for name, _ in parameters])

    adaptable = [(own_name(name), parameter) for name, parameter in parameters if _may_train(name)]
    chosen = {id(parameter) for name, parameter in adaptable if _part_of(name, names) is not None}
    for part in names:
        if argument == "train_only" and not any(_part_of(name, [part]) for name, _ in adaptable):
            raise ValueError(f"`train_only` names `{part}`, which has no LoRA; expected parts that the adapter holds.")
    trained = {id(p) for _, p in adaptable if (id(p) in chosen) == (train_only is not None)}
    if not trained:
        raise ValueError(f"`{argument}` is {list(names)}, which leaves nothing to train; expected other parts.")
    for _, parameter in parameters:
        parameter.requires_grad_(id(parameter) in trained)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    learning_rates: Mapping[str, float] | None,
    weight_decay: float,
    decay_parameter_names: Iterable[str],
) -> list[dict]:
    """Group the parameters that train for an optimizer: by learning rate, with and without weight decay.

    The parameters of the model itself (`logit_scale`, `embedding_tokens`) never decay: pulling the temperature and
    the read-out vectors towards zero is not regularisation.

    Args:
        model: An `MMGEMModel`, or one with LoRA.
        learning_rate: The rate of all parts that `learning_rates` does not name.
        learning_rates: A positive rate by name, as in [`set_trainable`]; the longest name that fits counts.
        weight_decay: The decay, at least 0.
        decay_parameter_names: Names that decay if they are not of the model itself, from
            `Trainer.get_decay_parameter_names`, which leaves out norms and biases.

    Returns:
        Dictionaries with `params`, `lr` and `weight_decay`, none of them empty; `learning_rate` first.

    Raises:
        TypeError: If a rate is not a number.
        ValueError: If the model does not have a name, nothing trains under it, or a rate is not positive.
    """
    rates = {part: _checked_rate(part, rate) for part, rate in (learning_rates or {}).items()}
    _check_names("learning_rates", rates, [own_name(name) for name, _ in model.named_parameters()])
    decaying, used = set(decay_parameter_names), set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(learning_rate, weight_decay): [], (learning_rate, 0): []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = _part_of(own_name(name), rates)
        used.add(part)
        rate = learning_rate if part is None else rates[part]
        decay = weight_decay if name in decaying and not is_bare(name) else 0
        groups.setdefault((rate, decay), []).append(parameter)
    for part in rates:
        if part not in used:
            raise ValueError(f"`learning_rates` names `{part}`, where nothing trains; expected parts that do.")
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items() if group]


def freeze_unused(model) -> list[str]:
    """Stop training the parameters of the vision tower that its patch features do not depend on.

    They would never get a gradient. DDP would have to search every step's graph for them, and cannot do so under
    gradient checkpointing; FSDP2 could not resume, as it expects an optimizer state for each parameter that trains.

    Args:
        model: An `MMGEMModel`, or one with LoRA, before it is handed to DDP or FSDP.

    Returns:
        The names of the parameters that this call has frozen.
    """
    trained = {name: p for name, p in model.named_parameters() if "vision_tower." in name and p.requires_grad}
    if not trained:
        return []
    was_training = model.training
    model.eval()  # nothing is drawn at random
    pixel_values = blank_image(model.config.grid, model.device).to(model.dtype)
    tokens = model.get_image_features(pixel_values).last_hidden_state
    model.train(was_training)
    gradients = torch.autograd.grad(tokens.sum(), list(trained.values()), allow_unused=True)
    unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    for name in unused:
        trained[name].requires_grad_(False)
    return unused


def _may_train(name: str) -> bool:
    """Everything may, but of a PEFT model only what its adapter holds, which alone is saved."""
    if not name.startswith(_PEFT_PREFIX):
        return True
    return ".lora_" in name or ".modules_to_save." in name or is_bare(name)


def _part_of(name: str, parts: Iterable[str]) -> str | None:
    """The longest of `parts` that a parameter belongs to."""
    return max((part for part in parts if f"{name}.".startswith(f"{part}.")), key=len, default=None)


def _check_names(argument: str, names: Iterable[str], own_names: list[str]) -> None:
    pieces = [name.split(".") for name in own_names]
    known = {".".join(piece[:length]): None for piece in pieces for length in range(1, len(piece) + 1)}
    parts = [name for name in known if "." not in name]
    for name in names:
        check_keys({name: None}, known if "." in str(name) else parts, f"`{argument}`")


def _checked_rate(part: str, rate: float) -> float:
    try:
        rate = float(rate)  # YAML reads `1e-5` as text
    except (TypeError, ValueError):
        raise TypeError(f"`learning_rates` gives `{part}` the rate {rate!r}; expected a number.") from None
    if not rate > 0:
        raise ValueError(f"`learning_rates` gives `{part}` the rate {rate}; expected more than 0, or `freeze`.")
    return rate
