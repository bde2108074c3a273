"""The Hub card of a trained model, written from its recipe, its figures and its log."""

import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.evaluation.evaluate import evaluate_model
from mmgem.training.printable import counted
from mmgem.training.recipes.recipe import Recipe
from mmgem.training.recipes.stage_kinds import stage_kind

TEMPLATE = Path(__file__).with_name("model_card.md")
ONLY_SCENES = (
    "\n\nIt has seen drawn scenes of colored shapes alone, with captions in a few forms of English: it shows and "
    "tests what the package does, and what it says of photographs means nothing."
)


def write_model_card(
    folder: Path, model: MMGEMModel, recipe: Recipe, metrics: Mapping[str, float], log_history: list[dict]
) -> None:
    """Write `README.md` into a checkpoint's folder.

    Args:
        folder: The folder of the checkpoint; its name becomes the model's.
        model: The trained model.
        recipe: The recipe that it was trained with.
        metrics: The figures of the final evaluation, by name.
        log_history: The entries that the trainers logged, stage after stage.
    """
    name = folder.resolve().name
    data = "Not measured: the recipe has no `eval_data`."
    if metrics and recipe.eval_data is not None:
        data = f"Measured on {_data_name(recipe.eval_data)}."
        if scenes := recipe.eval_data.get("scenes"):
            data += f" `mmgem scenes DATA --seed {scenes['seed']} --count {scenes['count']}` draws them."
    train_data = [section for stage in recipe.stages for section in stage.train_data]
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        vision=model.config.vision_config.model_type,
        text=model.config.text_config.model_type,
        parameters=f"{model.num_parameters() / 1e6:.1f} million",
        embedding=_describe_embedding(model.config),
        prompts=_describe_prompts(model.config.prompts),
        visual_tokens=model.config.num_visual_tokens,
        limits=ONLY_SCENES if all("scenes" in section for section in train_data) else "",
        data=data,
        train_data="; ".join(dict.fromkeys(map(_data_name, train_data))),
        results="\n".join(
            f"| {measure} | {value:.3f} | {describe_measure(measure)} |" for measure, value in metrics.items()
        ),
        steps=" + ".join(str(stage.training.get("max_steps", "all")) for stage in recipe.stages),
        losses=_describe_losses(recipe, log_history),
    )
    card_data = ModelCardData(
        model_name=name,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[
            *("mmgem", "sentence-transformers", "image-feature-extraction", "image-to-text", "feature-extraction"),
            *("zero-shot-image-classification", "any-to-any"),
            *(["multi-vector"] if model.config.is_multi_vector else []),
        ],
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type="image-folder",
                dataset_name=_data_name(recipe.eval_data or {}),
                metric_type=measure,
                metric_value=round(value, 4),
            )
            for measure, value in metrics.items()
        ]
        or None,
    )
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def describe_measure(name: str) -> str:
    """What a measure of [`evaluate_model`] is, as its docstring says it; nothing of one that it does not know."""
    for names, description in re.findall(r"^ *\| (`.*?) \| .*? \| (.*?) \|$", evaluate_model.__doc__ or "", re.M):
        for known in re.findall("`(.*?)`", names):
            pattern = re.escape(known).replace("@k", r"@\d+").replace("LANGUAGE", "[a-z]+")
            if re.fullmatch(pattern, name):
                return description
    return ""


def _data_name(section: Mapping[str, Any]) -> str:
    """What a person calls a data section: its folder or name, or what is drawn."""
    if "scenes" in section:
        return "{count} drawn scenes of seed {seed}".format_map(section["scenes"])
    where = next(iter(section.values()), "")
    parts = [where, *(section[name] for name in ("name", "split") if name in section)]
    return ", ".join(Path(part).name if isinstance(part, Path) else str(part) for part in parts)


def _describe_losses(recipe: Recipe, log_history: list[dict]) -> str:
    """Where each loss ended; a short run logs none, and a stage without one logs 0."""
    losses = {name: words for stage in recipe.stages for name, words in stage_kind(stage).losses.items()}
    last = {name: float(entry[name]) for entry in log_history for name in losses if float(entry.get(name, 0))}
    return "".join(f" The {losses[name]} ended at {last[name]:.3f}." for name in losses if name in last)


def _describe_embedding(config) -> str:
    width, count = f"{config.projection_dim} dimensions", config.num_embedding_tokens
    if not config.is_multi_vector:
        return width
    return (
        f"{counted(count, 'nested vector')} of {width} (with sentence-transformers by `MultiVectorEncoder`; "
        "`SentenceTransformer` gives the first of them); MaxSim was trained both ways, so that a query may be a text "
        "or an image; `encode_query` gives an image's first vector, which finds as much as all"
    )


def _describe_prompts(prompts: Mapping[str, str] | None) -> str:
    if not prompts:
        return ""
    named = ", ".join(f'`{name}` ("{text.strip()}")' for name, text in prompts.items())
    return f"\nPrompts by name, for `prompt_name` and `--prompt`: {named}."
