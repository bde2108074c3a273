"""A recipe is a YAML file that says everything about a training run: a model, and stages of data and arguments."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from transformers import CONFIG_MAPPING, SiglipImageProcessorPil

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.argument_checks import check_arguments, check_keys, check_type
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.open_source import check_section
from mmgem.training.recipes.tokenizer import train_tokenizer
from mmgem.training.reconstruction.masking import Reconstruction
from mmgem.training.reconstruction.trainer import UNUSED_ARGUMENTS
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.contrastive_losses import build_objective
from mmgem.training.trainer.lora import add_lora

SECTIONS = ("seed", "model", "image_processor", "tokenizer", "prompts", "eval_data", "stages")
STAGE_SECTIONS = (
    *("name", "image_size", "text_attention", "embedding"),
    *("train_data", "collator", "objective", "reconstruction", "training"),
)
MODEL_SECTIONS = ("attn_implementation", "dtype")  # beside those that say which model
# Arguments of the trainer that the run sets itself, or that have a place of their own in a stage.
_NOT_IN_TRAINING = ("output_dir", "resume_from_checkpoint", "train_sampling_strategy", "contrastive_objective")
# Fields of the configuration that have a place of their own in a recipe, or are no choice of its author.
_NOT_IN_MODEL = ("vision_config", "text_config", "image_token_id", "prompts", "calibrated_modalities")
_FOLDER_NAME = re.compile(r"[\w-][\w.-]*")


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 has it; to PyYAML it is text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+\Z"), list("-+0123456789"))


def load_recipe(path: str | Path) -> dict[str, Any]:
    """
    Read a recipe and check it, to the last key, before any data or model is loaded.

    | section | content |
    |---|---|
    | `model` | which model, in one of three ways, see below |
    | `tokenizer` | arguments of `train_tokenizer`, which learns from the data of the first stage |
    | `image_processor` | arguments of the image processor that are to be others |
    | `prompts` | instructions by name, which the model keeps and those who embed with it can ask for |
    | `eval_data` | a data section (see [`mmgem.training.data.sources.open_source`]) to measure the model on |
    | `seed` | of weights, orders and draws; 0 by default |
    | `stages` | a list, see below |

    The model is `{pretrained: NAME}`, or towers to compose, `{vision: NAME, text: NAME}`, or, from nothing,
    `{vision_config: {...}, text_config: {...}}`, which takes the sections `tokenizer` and `image_processor`. The last
    two may have further fields of `MMGEMConfig`, each of the three an `attn_implementation` and a `dtype` to train
    with.

    | section of a stage | content |
    |---|---|
    | `name` | a name for its folder |
    | `train_data` | a data section or a list of them, each with a `weight`: a mixture |
    | `training` | arguments of `MMGEMTrainingArguments` |
    | `image_size` | side of the images in pixels; by default as before |
    | `text_attention` | `causal` or `bidirectional`, while a text is embedded; by default as before |
    | `embedding` | arguments of `MMGEMModel.set_embedding_tokens`; by default as before |
    | `collator` | arguments of `MMGEMCollator` |
    | `objective` | options of [`mmgem.training.trainer.contrastive_losses.build_objective`] |
    | `reconstruction` | options of [`mmgem.training.reconstruction.masking.Reconstruction`], see below |

    A stage with a section `reconstruction`, be it empty (`{}`), learns to put back masked tokens and patches, and
    nothing else; it takes no `objective`.

    Args:
        path: a YAML file with the sections of `SECTIONS`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML, for a key that is unknown (the nearest known one is named), a section that is
            missing, or a value of a wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {str(path)!r} is not there; expected a YAML file.")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506, a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {str(path)!r} is not YAML: {error}") from error
    check_keys(recipe, SECTIONS, "recipe")
    for name in ("model", "stages"):
        if not recipe.get(name):
            raise ValueError(f"recipe {str(path)!r} has no section `{name}`.")
    check_type(recipe.get("seed", 0), int, "`seed`")
    if "prompts" in recipe:
        check_type(recipe["prompts"], dict[str, str], "`prompts`")
    _check_model(recipe)
    if "eval_data" in recipe:
        check_section(recipe["eval_data"], "`eval_data`")
    check_type(recipe["stages"], list, "`stages`")
    for number, stage in enumerate(recipe["stages"], start=1):
        _check_stage(stage, number)
    names = stage_names(recipe)
    if len(set(names)) < len(names):
        raise ValueError(f"`stages` are called {', '.join(names)}; expected a name of its own for each.")
    return dict(recipe)


def stage_names(recipe: Mapping[str, Any]) -> list[str]:
    """The names of the stages, in order."""
    return [stage["name"] for stage in recipe["stages"]]


def stage_number(recipe: Mapping[str, Any], stage: str | int) -> int:
    """
    Which of the stages, from 0 on, a user means by a name or by a number from 1 on.

    Raises:
        ValueError: if there is no such stage.
    """
    names = stage_names(recipe)
    numbers = [str(number) for number in range(1, len(names) + 1)]
    for known in (names, numbers):
        if str(stage) in known:
            return known.index(str(stage))
    raise ValueError(f"`stage` is {stage!r}; expected a number from 1 to {len(names)} or one of {', '.join(names)}.")


def first_difference(old: Any, new: Any, name: str = "") -> str | None:
    """Where two recipes differ first, such as "`stages[1].training.max_steps` is 10, was 20"; None if they do not."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        missing = object()
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{name}.{key}" if name else str(key)
            was, now = old.get(key, missing), new.get(key, missing)
            if was is missing or now is missing:
                return f"`{inner}` is {'new' if was is missing else 'gone'}"
            if difference := first_difference(was, now, inner):
                return difference
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"`{name}` has {len(new)} entries, had {len(old)}"
        pairs = enumerate(zip(old, new, strict=True))
        return next((found for i, pair in pairs if (found := first_difference(*pair, f"{name}[{i}]"))), None)
    return None if old == new else f"`{name}` is {new!r:.80}, was {old!r:.80}"


def _check_stage(stage: object, number: int) -> None:
    check_keys(stage, STAGE_SECTIONS, f"stage {number}")
    assert isinstance(stage, Mapping)
    for name in ("name", "train_data", "training"):
        if name not in stage:
            raise ValueError(f"stage {number} comes without `{name}`.")
    check_type(stage["name"], str, f"`name` of stage {number}")
    if not _FOLDER_NAME.fullmatch(stage["name"]):
        raise ValueError(f"`name` of stage {number} is {stage['name']!r}; expected a name for a folder.")
    of_stage = f"of stage `{stage['name']}`"
    check_type(stage.get("image_size", 1), int, f"`image_size` {of_stage}")
    if stage.get("image_size", 1) < 1:
        raise ValueError(f"`image_size` {of_stage} is {stage['image_size']}; expected pixels, 1 or more.")
    check_type(
        stage.get("text_attention", "causal"), Literal["causal", "bidirectional"], f"`text_attention` {of_stage}"
    )
    if "embedding" in stage:
        check_arguments(stage["embedding"], MMGEMModel.set_embedding_tokens, f"`embedding` {of_stage}", given=["self"])
    sources = stage["train_data"]
    is_mixture = isinstance(sources, Sequence) and not isinstance(sources, str)
    if is_mixture and not sources:
        raise ValueError(f"`train_data` {of_stage} is an empty list; expected at least one source.")
    for source in sources if is_mixture else [sources]:
        check_section(source, f"`train_data` {of_stage}")
    given = ["processor", "num_embedding_tokens", "prompts"]  # by the model
    check_arguments(stage.get("collator", {}), MMGEMCollator, f"`collator` {of_stage}", given=given)
    try:
        check_type(stage.get("objective", {}), dict, f"`objective` {of_stage}")
        build_objective(**stage.get("objective", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`objective` {of_stage}: {error}") from error
    training = stage["training"]
    if "reconstruction" in stage:
        _check_reconstruction(stage, of_stage)
    # `fsdp: true` is what the library asks for, but not what its annotation says.
    typed = {key: training[key] for key in training if key != "fsdp"} if isinstance(training, Mapping) else training
    check_arguments(typed, MMGEMTrainingArguments, f"`training` {of_stage}", given=_NOT_IN_TRAINING)
    if training.get("lora") is not None:
        check_arguments(training["lora"], add_lora, f"`lora` {of_stage}", given=["model"], rest=LoraConfig)
    for part, rate in (training.get("learning_rates") or {}).items():
        check_type(rate, float, f"`{part}` in `learning_rates` {of_stage}")


def _check_reconstruction(stage: Mapping[str, Any], of_stage: str) -> None:
    section, training = stage["reconstruction"], stage["training"]
    check_arguments(section, Reconstruction, f"`reconstruction` {of_stage}")
    try:
        Reconstruction(**section)
    except ValueError as error:
        raise ValueError(f"`reconstruction` {of_stage}: {error}") from error
    unused = [name for name in UNUSED_ARGUMENTS if isinstance(training, Mapping) and name in training]
    if unused or "objective" in stage:
        raise ValueError(
            f"`reconstruction` and `{unused[0] if unused else 'objective'}` {of_stage} exclude each other; expected "
            "one of them."
        )


def _check_model(recipe: Mapping[str, Any]) -> None:
    section = recipe["model"]
    from_nothing = isinstance(section, Mapping) and not {"pretrained", "vision", "text"} & set(section)
    fields = [name for name in MMGEMConfig.__annotations__ if name not in _NOT_IN_MODEL]
    if not isinstance(section, Mapping) or "pretrained" in section:
        required, optional = ["pretrained"], []
    else:
        required, optional = (["vision_config", "text_config"] if from_nothing else ["vision", "text"]), fields
    check_keys(section, [*required, *optional, *MODEL_SECTIONS], "`model`")
    if missing := [name for name in required if name not in section]:
        raise ValueError(
            f"`model` has no `{missing[0]}`; expected `pretrained`, or `vision` and `text`, or `vision_config` and "
            "`text_config`."
        )
    for name in [] if from_nothing else required:
        check_type(section[name], str, f"`{name}` in `model`")
    check_type(section.get("attn_implementation", ""), str, "`attn_implementation` in `model`")
    check_type(section.get("dtype", "float32"), Literal["float32", "bfloat16", "float16"], "`dtype` in `model`")

    for name in ("tokenizer", "image_processor"):
        if from_nothing and name not in recipe:
            raise ValueError(f"recipe has no section `{name}`, which a model from nothing takes.")
    if "tokenizer" in recipe:
        if not from_nothing:
            raise ValueError("recipe has a section `tokenizer`, but the model has one; expected to leave it out.")
        check_arguments(recipe["tokenizer"], train_tokenizer, "`tokenizer`", given=["texts"])
    if "image_processor" in recipe:
        check_keys(
            recipe["image_processor"], SiglipImageProcessorPil.valid_kwargs.__annotations__, "`image_processor`"
        )

    config = {name: section[name] for name in fields if name in section}
    if "prompts" in recipe:
        config["prompts"] = recipe["prompts"]
    if from_nothing:
        for name in required:
            _check_tower_config(section[name], f"`{name}` in `model`")
            config[name] = dict(section[name])
    try:
        MMGEMConfig(**config)
    except StrictDataclassError as error:
        raise ValueError(f"`model`: {' '.join(str(error).split())}") from error


def _check_tower_config(section: object, where: str) -> None:
    model_type = section.get("model_type") if isinstance(section, Mapping) else None
    if model_type is None:
        raise ValueError(f"{where} is {section!r:.80}; expected a mapping with a `model_type` and its fields.")
    check_keys({model_type: None}, CONFIG_MAPPING, f"`model_type` of {where}")
    config_class = CONFIG_MAPPING[model_type]
    check_keys(section, ["model_type", *config_class.__dataclass_fields__, *config_class.attribute_map], where)
