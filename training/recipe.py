"""A recipe is a YAML file that says everything about a training run: a model, and stages of data and arguments."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from transformers import TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training.checkpoint import load_checkpoint
from mmgem.training.collator import MMGEMCollator
from mmgem.training.image_folder import read_image_folder
from mmgem.training.model_card import write_model_card
from mmgem.training.scene_dataset import SceneDataset
from mmgem.training.tokenizer import train_tokenizer
from mmgem.training.trainer import MMGEMTrainer, MMGEMTrainingArguments

TOKENIZER_TRAINING_ROWS = 4000
SECTIONS = ("seed", "model", "image_processor", "tokenizer", "eval_data", "stages")
STAGE_SECTIONS = ("name", "train_data", "collator", "training")


def load_recipe(path: str | Path) -> dict:
    """
    Read a recipe and check the names of its sections.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown or missing section.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recipe {str(path)!r} is not there; expected a YAML file.")
    recipe = yaml.safe_load(path.read_text())
    if not isinstance(recipe, Mapping):
        raise ValueError(
            f"recipe {str(path)!r} holds {type(recipe).__name__}; expected sections {', '.join(SECTIONS)}."
        )
    _check_keys(recipe, SECTIONS, "recipe")
    for name in ("model", "stages"):
        if not recipe.get(name):
            raise ValueError(f"recipe {str(path)!r} has no section `{name}`.")
    for stage in recipe["stages"]:
        _check_keys(stage, STAGE_SECTIONS, "stages")
        for name in ("name", "train_data", "training"):
            if name not in stage:
                raise ValueError(f"recipe {str(path)!r} has a stage without `{name}`.")
    return dict(recipe)


def train(recipe_path: str | Path, out: str | Path, resume: bool = False) -> dict[str, float]:
    """
    Train as a recipe says, stage after stage, and leave a complete Hub folder: weights, remote code, processor,
    sentence-transformers files, card, the recipe, the results and the log of the run.

    Args:
        recipe_path: YAML with the sections of `SECTIONS`. `model` is one of `{pretrained: NAME}`,
            `{vision: NAME, text: NAME, ...}` (composed towers, further keys go to `MMGEMConfig`) and
            `{vision_config: {...}, text_config: {...}, ...}` (from nothing, with `tokenizer` and `image_processor`);
            each may name an `attn_implementation` to train with. A stage has a `name`, `train_data`, arguments of the
            `collator`, and `training`, arguments of `MMGEMTrainingArguments`; the model goes from stage to stage, the
            optimizer starts anew. Data is `{scenes: {seed: S, count: N}}` or `{folder: PATH}`.
        out: folder for the result; `checkpoints/STAGE` holds what is needed to resume.
        resume: go on from the last checkpoint in `out`, if there is one.

    Returns:
        The metrics of the final evaluation, empty without `eval_data`.

    Raises:
        FileNotFoundError, ValueError: for a recipe or data that cannot be used.
        FileExistsError: if `out` holds checkpoints and `resume` is not asked for.
    """
    recipe, out = load_recipe(recipe_path), Path(out)
    stages = recipe["stages"]
    folders = [out / "checkpoints" / stage["name"] for stage in stages]
    last_checkpoints = [get_last_checkpoint(folder) if folder.is_dir() else None for folder in folders]
    if any(last_checkpoints) and not resume:
        raise FileExistsError(f"`out` is {str(out)!r}, which holds checkpoints; resume, or choose another folder.")
    # A stage that a later one has begun after is finished; the later checkpoint holds its weights.
    first = max((i for i, checkpoint in enumerate(last_checkpoints) if checkpoint), default=0)

    seed = recipe.get("seed", 0)
    set_seed(seed)
    eval_dataset = load_data(recipe["eval_data"], "eval_data") if "eval_data" in recipe else None
    processor, model = build_model(recipe)
    if "attn_implementation" in recipe["model"]:
        model.set_attn_implementation(recipe["model"]["attn_implementation"])
    log_history = []
    for number, (stage, folder, last_checkpoint) in enumerate(zip(stages, folders, last_checkpoints, strict=True)):
        state = TrainerState.load_from_json(f"{last_checkpoint}/{TRAINER_STATE_NAME}") if last_checkpoint else None
        if number < first:
            log_history += _named(stage, state)
            continue
        defaults = {
            "seed": seed,
            "report_to": "none",
            "disable_tqdm": False,
            "use_cpu": not torch.accelerator.is_available(),  # bf16 on a CPU has to be asked for
        }
        arguments = MMGEMTrainingArguments(output_dir=str(folder), **(defaults | stage["training"]))
        trainer = MMGEMTrainer(
            model,
            arguments,
            processing_class=processor,
            data_collator=MMGEMCollator(processor, **stage.get("collator", {})),
            train_dataset=load_data(stage["train_data"], "train_data"),
            eval_dataset=eval_dataset,
        )
        if state is not None and state.global_step >= state.max_steps:
            # Killed between two stages; the Trainer would take one step too many.
            trainer._load_from_checkpoint(last_checkpoint)
            trainer.state = state
        else:
            trainer.train(resume_from_checkpoint=last_checkpoint)
        log_history += _named(stage, trainer.state)

    metrics = trainer.evaluate(metric_key_prefix="") if eval_dataset is not None else {}
    if trainer.is_world_process_zero():
        save_sentence_transformer(model, processor, out)
        (out / "recipe.yaml").write_text(Path(recipe_path).read_text())
        _write_json(out / "training_log.json", log_history)
        _write_json(out / "results.json", metrics)
        write_model_card(out, model, recipe, metrics, log_history)
    return metrics


def _named(stage: Mapping, state: TrainerState | None) -> list[dict]:
    """What was logged in a stage, with its name."""
    return [{"stage": stage["name"]} | entry for entry in (state.log_history if state else [])]


def _write_json(path: Path, content: Mapping | list):
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load_data(section: Mapping, name: str):
    """
    The data set of a section: scenes drawn on the fly, or an image folder with `metadata.jsonl`.

    Raises:
        ValueError: if the section names neither.
    """
    _check_keys(section, ("scenes", "folder"), name)
    if len(section) != 1:
        raise ValueError(f"`{name}` is {dict(section)}; expected either `scenes` or `folder`.")
    if "scenes" in section:
        return SceneDataset(**section["scenes"])
    return read_image_folder(section["folder"])


def build_model(recipe: Mapping) -> tuple[MMGEMProcessor, MMGEMModel]:
    """
    Processor and model of a recipe: a checkpoint, composed towers, or configs to train from nothing, with a tokenizer
    that learns from the data of the first stage.
    """
    section = {key: value for key, value in recipe["model"].items() if key != "attn_implementation"}
    if "pretrained" in section:
        model, processor = load_checkpoint(section["pretrained"])
        return processor, model
    if "vision" in section:
        model = MMGEMModel.from_towers(**section)
        processor = MMGEMProcessor.from_towers(
            section["vision"],
            section["text"],
            num_visual_tokens=model.config.num_visual_tokens,
            num_embedding_tokens=model.config.num_embedding_tokens,
        )
        return processor, model

    from transformers import SiglipImageProcessorPil

    train_dataset = load_data(recipe["stages"][0]["train_data"], "train_data")
    rows = range(min(len(train_dataset), TOKENIZER_TRAINING_ROWS))
    tokenizer = train_tokenizer(_texts(train_dataset, rows), **recipe["tokenizer"])
    section["text_config"] = section["text_config"] | {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = MMGEMConfig(image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **section)
    processor = MMGEMProcessor(
        SiglipImageProcessorPil(**recipe["image_processor"]), tokenizer, num_visual_tokens=config.num_visual_tokens
    )
    return processor, MMGEMModel(config)


def _texts(dataset, rows):
    """Every text of the rows, whatever column it stands in."""
    for row in rows:
        for column, value in dataset[row].items():
            if column not in ("image", "file_name", "scene_id"):
                yield from _strings(value)


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _check_keys(section: Mapping, known: tuple[str, ...], name: str):
    for key in section:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
            raise ValueError(f"`{name}` has the unknown key `{key}`; expected {', '.join(known)}.{hint}")
