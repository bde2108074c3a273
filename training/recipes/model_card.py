"""The Hub card of a trained model, written from its recipe and what was measured."""

from collections.abc import Mapping
from pathlib import Path
from string import Template

from huggingface_hub import EvalResult, ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md")


def write_model_card(folder: Path, model, recipe: Mapping, metrics: Mapping[str, float], log_history: list[dict]):
    """
    Write `README.md` into a checkpoint's folder.

    Args:
        folder: of the checkpoint; its name becomes the model's.
        model: the `MMGEMModel`.
        recipe: as loaded by `mmgem.training.recipes.recipe.load_recipe`.
        metrics: name to value, of the final evaluation.
        log_history: what the trainer logged, stage after stage.
    """
    name = folder.resolve().name
    losses: dict = next((entry for entry in reversed(log_history) if "caption_loss" in entry), {})
    data = f"Measured on `{recipe['eval_data']}`." if metrics else "Not measured: the recipe has no `eval_data`."
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        vision=model.config.vision_config.model_type,
        text=model.config.text_config.model_type,
        parameters=f"{model.num_parameters() / 1e6:.1f} million",
        embedding=_describe_embedding(model.config),
        prompts=_describe_prompts(model.config.prompts),
        visual_tokens=model.config.num_visual_tokens,
        data=data,
        results="\n".join(f"| {measure} | {value:.3f} |" for measure, value in metrics.items()),
        steps=" + ".join(str(stage["training"].get("max_steps", "all")) for stage in recipe["stages"]),
        caption_loss=f"{losses.get('caption_loss', float('nan')):.3f}",
        contrastive_loss=f"{losses.get('contrastive_loss', float('nan')):.3f}",
    )
    card_data = ModelCardData(
        model_name=name,
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["mmgem", "sentence-transformers", "image-feature-extraction", "image-to-text", "feature-extraction"],
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type="image-folder",
                dataset_name=str(recipe["eval_data"]),
                metric_type=measure,
                metric_value=round(value, 4),
            )
            for measure, value in metrics.items()
        ]
        or None,
    )
    ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _describe_embedding(config) -> str:
    width, count = f"{config.projection_dim} dimensions", config.num_embedding_tokens
    if config.embedding_pooling != "multi_vector":
        return width
    return (
        f"{count} nested vectors of {width} (with sentence-transformers by `MultiVectorEncoder`; "
        "`SentenceTransformer` gives the first of them)"
    )


def _describe_prompts(prompts: Mapping[str, str] | None) -> str:
    if not prompts:
        return ""
    named = ", ".join(f'`{name}` ("{text.strip()}")' for name, text in prompts.items())
    return f"\nPrompts by name, for `prompt_name` and `--prompt`: {named}."
