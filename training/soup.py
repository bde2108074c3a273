"""Checkpoint averaging: one model whose weights are the mean of those of several (`mmgem soup`)."""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training.loading import unchanged
from mmgem.training.output_folder import whole_folder
from mmgem.training.output_lock import one_writer
from mmgem.weight_checks import loading

# The keys that say how a folder was written, not which model it is.
_WRITTEN_BY = ("_name_or_path", "transformers_version", "use_cache", "dtype")


@one_writer
def soup(folders: Sequence[str | Path], out: str | Path, weights: Sequence[float] | None = None) -> dict[str, float]:
    """Averages the weights of models into a complete Hub folder, with `soup.json` saying what it is made of.

    The models are fine-tuned from one (Model soups, https://arxiv.org/abs/2203.05482), or checkpoints of one run.

    Floating-point tensors are averaged in float64, one at a time, and come out in their own type; all others must be
    equal. Processor, prompts and generation settings are those of the first folder.

    Args:
        folders: Two or more, of trained models or `checkpoint-N` of a run; of one configuration and one tokenizer.
        out: A new or empty folder.
        weights: One per folder, 0 or more; divided by their sum. By default all are equal.

    Returns:
        The share of each folder in the mean.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileExistsError: If `out` holds something.
        FileNotFoundError: If there is a folder without config or weights, such as one that holds a LoRA adapter.
        ValueError: If there are fewer than two folders, a folder is given twice, weights do not fit or are not finite,
            models differ in more than their weights, or one is written meanwhile.
    """
    paths, out = [Path(folder) for folder in folders], Path(out)
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise ValueError(f"`folders` is {[str(path) for path in paths]}; expected two or more different ones.")
    shares = _shares(weights, len(paths))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"`out` is {str(out)!r}, which holds something; expected a new or empty folder.")
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(unchanged(path, "folders"))
        model, processor = _mean(paths, shares)
    made_of = {str(path): share for path, share in zip(paths, shares, strict=True)}
    with whole_folder(out) as folder:
        save_sentence_transformer(model, processor, folder)
        (folder / "soup.json").write_text(json.dumps(made_of, indent=2) + "\n", encoding="utf-8")
    return made_of


def _mean(paths: list[Path], shares: list[float]) -> tuple[MMGEMModel, MMGEMProcessor]:
    """The mean of models, and the processor of the first."""
    configs = [_read_config(path) for path in paths]
    for path, config in zip(paths[1:], configs[1:], strict=True):
        _check_equal(configs[0], config, "config.json", paths[0], path)
        if _tokenizer(path) != _tokenizer(paths[0]):
            raise ValueError(f"{str(paths[0])!r} and {str(path)!r} have different tokenizers; expected the same one.")

    averaged = _average(paths, shares)
    config = MMGEMConfig.from_pretrained(paths[0])
    # Through the class, which ties weights and knows how their names on disk differ from its own.
    model = MMGEMModel.from_pretrained(None, config=config, state_dict=averaged, dtype=config.dtype)
    model.name_or_path = ""  # it is "None", whose processor would be looked for on the Hub
    if (paths[0] / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(paths[0])
    return model, MMGEMProcessor.from_pretrained(paths[0], trust_remote_code=False)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    weights = [1.0] * count if weights is None else list(weights)
    fits = len(weights) == count and all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if not fits or not 0 < sum(weights) < math.inf:
        raise ValueError(f"`weights` is {weights}; expected {count} numbers, 0 or more, with a finite sum above 0.")
    return [weight / sum(weights) for weight in weights]


def _average(paths: list[Path], shares: list[float]) -> dict[str, torch.Tensor]:
    files = [_weight_files(path) for path in paths]
    for path, others in zip(paths[1:], files[1:], strict=True):
        for name in sorted(files[0].keys() ^ others.keys()):
            holder, misser = (paths[0], path) if name in files[0] else (path, paths[0])
            raise ValueError(f"`{name}` is in {str(holder)!r}, but not in {str(misser)!r}; expected the same weights.")
    return {name: _average_tensor(name, paths, [_tensor(of[name], name) for of in files], shares) for name in files[0]}


def _average_tensor(name: str, paths: list[Path], tensors: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    first = tensors[0]
    for path, tensor in zip(paths, tensors, strict=True):
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                f"`{name}` is {first.dtype} {tuple(first.shape)} in {str(paths[0])!r}, but {tensor.dtype} "
                f"{tuple(tensor.shape)} in {str(path)!r}; expected the same."
            )
        is_counter = name.endswith(".num_batches_tracked")  # of a BatchNorm: no weight
        if not first.is_floating_point() and not is_counter and not torch.equal(tensor, first):
            raise ValueError(f"`{name}` differs between {str(paths[0])!r} and {str(path)!r}, and has no mean.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` is not finite in {str(path)!r}; expected finite weights.")
    if not first.is_floating_point():
        return torch.stack(tensors).amax(dim=0)
    mean = torch.zeros_like(first, dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        mean.add_(tensor.double(), alpha=share)
    return mean.to(first.dtype)


def _weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds each tensor."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        with loading("folders", str(folder)):
            return {name: folder / file for name, file in _read_json(index)["weight_map"].items()}
    file = folder / SAFE_WEIGHTS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {SAFE_WEIGHTS_NAME}; expected the folder of a whole model.")
    with loading("folders", str(folder)), safe_open(file, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def _tensor(file: Path, name: str) -> torch.Tensor:
    with loading("folders", str(file.parent)), safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} is not there; expected the folder of a whole model (merge an adapter into one first)."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _read_config(folder: Path) -> dict:
    """A folder's configuration, with what the version that wrote it did not know: a model completes it."""
    _read_json(folder / "config.json")
    with torch.device("meta"):
        config = MMGEMModel(MMGEMConfig.from_pretrained(folder)).config
    return json.loads(config.to_json_string(use_diff=False))


def _tokenizer(folder: Path) -> dict | None:
    """A folder's tokenizer, without how it was last called."""
    path = folder / "tokenizer.json"
    return _read_json(path) | {"padding": None, "truncation": None} if path.is_file() else None


def _check_equal(first, other, key: str, first_path: Path, path: Path):
    """Refuses configs that differ, naming the key at which they do."""
    if isinstance(first, dict) and isinstance(other, dict):
        for name in [*first, *other]:
            if name not in _WRITTEN_BY:
                _check_equal(first.get(name), other.get(name), f"{key}: {name}", first_path, path)
    elif first != other:
        raise ValueError(
            f"{key} is {first!r} in {str(first_path)!r}, but {other!r} in {str(path)!r}; expected the same."
        )
