"""Two ways to read an embedding that take no training of their own: by a prompt, and after a rationale.

    python -m benchmarks.reading_modes [--model MODEL]

By a prompt (E5-V, https://arxiv.org/abs/2407.12580): recall@1 of captions searching images where both are read as the
last state of the prompt, beside the trained [EMB] vector and chance. After a rationale (RGE,
https://arxiv.org/abs/2511.16150): how often an image with an instruction is nearest to the region that it names, and
an image with an edit to the edited image, by the number of tokens that the model may write before it is read. Scenes
are of a seed that nothing trains on.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import normalize
from tqdm import tqdm

from benchmarks.measure import machine_facts, markdown_table
from mmgem.late_interaction import similarity
from mmgem.training.evaluation.metrics import recall_at, retrieval_ranks
from mmgem.training.inference import embed_images, embed_regions, embed_texts, inference
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset

CHECKPOINT = Path(__file__).parents[1] / "model_cards" / "mmgem-tiny"
SEED = 5_000_000  # of no training data
COLUMNS = ("image", "captions", "boxes", "instructions", "edit", "edited_image")
PROMPTS = ("a picture of", "a picture with", "what is in the center?", "how many objects are there?")
RATIONALE_TOKENS = (0, 8, 32)
BATCH_SIZE = 32

Rows = Sequence[dict]


def compare_prompts(model, processor, rows: Rows, prompts: Sequence[str] = PROMPTS) -> str:
    """The table of prompts, as markdown; the model keeps the last of them."""
    captions = [row["captions"][0] for row in rows]
    lines = [("chance", f"{1 / len(rows):.3f}"), ("[EMB], trained", _recall(model, processor, rows, captions))]
    model.set_embedding_tokens(1, "last")
    for prompt in prompts:
        model.set_embedding_prompt(processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        lines.append((f'"{prompt}"', _recall(model, processor, rows, captions)))
    return markdown_table(("read by", "recall@1"), lines)


def _recall(model, processor, rows: Rows, captions: list[str]) -> str:
    images = torch.cat([embed_images(model, processor, [row["image"] for row in part]) for part in _batches(rows)])
    ranks = retrieval_ranks(embed_texts(model, processor, captions), images, [{number} for number in range(len(rows))])
    return f"{recall_at(ranks, 1):.3f}"


def compare_rationales(model, processor, rows: Rows, numbers: Sequence[int] = RATIONALE_TOKENS) -> str:
    """The table of rationales, as markdown."""
    lines = []
    for number in numbers:
        regions = [_finds_regions(model, processor, part, number) for part in _batches(rows)]
        found = [hit for hits in regions for hit in hits]
        lines.append((number, f"{sum(found) / len(found):.3f}", f"{_finds_twins(model, processor, rows, number):.3f}"))
    return markdown_table(("tokens of the rationale", "named region", "edited image, recall@1"), lines)


def _finds_regions(model, processor, rows: Rows, number: int) -> list[bool]:
    """For each instruction about one of several boxes, whether its box is the nearest of its image."""
    rows = [row for row in rows if len(row["boxes"]) > 1]
    if not rows:
        return []
    counts = [len(row["boxes"]) for row in rows]
    regions = embed_regions(model, processor, [row["image"] for row in rows], [row["boxes"] for row in rows])
    asked = [(row, instruction) for row in rows for instruction in row["instructions"]]
    queries = _embed(model, processor, "object", [(row["image"], asks["text"]) for row, asks in asked], number)
    own = dict(zip(map(id, rows), regions.split(counts), strict=True))
    return [
        int(similarity(query[None], own[id(row)])[0].argmax()) == instruction["box"]
        for query, (row, instruction) in zip(queries, asked, strict=True)
    ]


def _finds_twins(model, processor, rows: Rows, number: int) -> float:
    """Recall@1 of images with edits among all images and all edited ones."""
    rows = [row for row in rows if row["edited_image"] is not None]
    pictures = [row[column] for column in ("image", "edited_image") for row in rows]
    gallery = torch.cat([embed_images(model, processor, part) for part in _batches(pictures)])
    asked = [(row["image"], row["edit"]["instruction"]) for row in rows]
    queries = torch.cat([_embed(model, processor, "edit", part, number) for part in _batches(asked)])
    return recall_at(retrieval_ranks(queries, gallery, [{len(rows) + row} for row in range(len(rows))]), 1)


def _embed(model, processor, prompt_name: str, asked: Sequence[tuple], number: int) -> torch.Tensor:
    """(N, ...) of images with texts, after a rationale of at most so many tokens."""
    prompt = (model.config.prompts or {}).get(prompt_name, "")
    texts = [f"{processor.image_token}{prompt}{text}" for _, text in asked]
    inputs = processor(images=[image for image, _ in asked], text=texts, return_tensors="pt").to(model.device)
    with inference(model):
        embeds = model.get_multimodal_features(**inputs, max_rationale_tokens=number).pooler_output
    return normalize(embeds.float(), dim=-1)


def _batches(items: Sequence) -> Iterator[Sequence]:
    for start in tqdm(range(0, len(items), BATCH_SIZE), leave=False):
        yield items[start : start + BATCH_SIZE]


def main(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, or a name on the Hub.")] = str(CHECKPOINT),
    scenes: Annotated[int, typer.Option(min=4, help="Scenes to search.")] = 300,
):
    dataset = SceneDataset(SEED, scenes, unique=True, columns=COLUMNS)
    rows = [dataset[row] for row in range(scenes)]
    print(machine_facts(), f"{scenes} scenes.", sep="\n\n")
    print("", compare_rationales(*load_checkpoint(model), rows), sep="\n")
    print("", compare_prompts(*load_checkpoint(model), rows), sep="\n")


if __name__ == "__main__":
    typer.run(main)
