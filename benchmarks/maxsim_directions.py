"""Which side may ask in MaxSim, by which side asked in training, on generated scenes.

    python -m benchmarks.maxsim_directions [--pairs 1500] [--held-out 400] [--seeds 3]

MaxSim looks for each vector of the query among those of the document, so it differs by the side that asks. The towers
of `mmgem-tiny` stay as they are, and what they make of each image and caption is computed once. New heads (the vectors
of images, both projections and the temperature) then learn from these pairs: by a loss in which texts ask whoever the
anchor is, as ColBERT is trained, and by that of the package, in which the anchor asks.

The table shows recall@1 among the held-out scenes, means over the seeds with half the width of their 95% intervals.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, NamedTuple

import torch
import typer
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import set_seed

from benchmarks.experiment_report import interval
from benchmarks.measure import machine_facts, markdown_table
from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.contrastive import Pairs
from mmgem.contrastive_batch import IMAGE, ContrastiveBatch
from mmgem.late_interaction import similarity
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.evaluation.metrics import ranks_of_scores, recall_at, retrieval_ranks
from mmgem.training.inference import inference
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.trainer.contrastive_losses import InfoNCE

CHECKPOINT = Path(__file__).parents[1] / "model_cards" / "mmgem-tiny"
TRAIN_SEED, HELD_OUT_SEED = 6_000_000, 7_000_000  # of no other training data
BATCH_SIZE, STEPS, LEARNING_RATE, WARMUP = 128, 200, 2e-3, 20
GROUPS = [[1, 1], [2, 2], [4, 4], [8, 8]]
SCENES_AT_ONCE = 50


class TextsAsk(InfoNCE):
    """The same loss, in which texts are the queries of MaxSim in both directions."""

    def loss(self, pairs: Pairs, rows: torch.Tensor) -> torch.Tensor:
        rankings = pairs.by_text(rows), pairs.by_target(rows, targets_ask=False)
        losses = sum(self._cross_entropy(ranking) for ranking in rankings)  # (A,)
        return (losses / 2 / pairs.counts[rows]).sum()


OBJECTIVES = {"texts": TextsAsk, "both": InfoNCE}
MEASURES = (
    "text to image, the text asks",
    "image to text, the text asks",
    "image to text, the image asks",
    "image to text, its first vector asks",
)


class States(NamedTuple):
    """What the towers make of scenes.

    Args:
        images: (I, n, C) visual tokens.
        texts: (T, k, H) states at the [EMB] vectors.
        image_of_text: (T,) long.
    """

    images: torch.Tensor
    texts: torch.Tensor
    image_of_text: torch.Tensor


def states_of_scenes(model, processor, seed: int, count: int, captions: int | None) -> States:
    """Scenes, no two alike, and so many captions of each, by default all."""
    scenes = SceneDataset(seed, count, unique=True, columns=("image", "captions"))
    images, texts, numbers = [], [], []
    with inference(model):
        for start in tqdm(range(0, count, SCENES_AT_ONCE), desc="scenes", unit="batch"):
            rows = [scenes[number] for number in range(start, min(start + SCENES_AT_ONCE, count))]
            pixels = processor(images=[row["image"] for row in rows], return_tensors="pt")
            images.append(model.get_image_features(**pixels).last_hidden_state)
            own = [row["captions"][:captions] for row in rows]
            tokens = processor(text=sum(own, []), padding=True, return_tensors="pt")
            texts.append(model.get_text_features(**tokens).last_hidden_state)
            numbers += [number for number, some in enumerate(own, start) for _ in some]
    return States(torch.cat(images), torch.cat(texts), torch.tensor(numbers))


def embed(model, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (I, k, D) and (T, k, D) of states."""
    image_embeds = model.image_projection(model.image_vectors(images))
    return normalize(image_embeds, dim=-1), normalize(model.text_projection(texts), dim=-1)


def train(config: MMGEMConfig, states: States, objective: InfoNCE, seed: int, steps: int = STEPS) -> MMGEMModel:
    """A new model of the configuration, whose heads are trained on a caption of each scene."""
    set_seed(seed)
    model = MMGEMModel(config)
    heads = [model.image_vectors, model.image_projection, model.text_projection]
    parameters = [model.logit_scale, *(parameter for head in heads for parameter in head.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=WARMUP / steps)
    own = torch.arange(min(BATCH_SIZE, len(states.images)))
    modality = torch.full_like(own, IMAGE)
    for _ in tqdm(range(steps), desc=f"{type(objective).__name__}, seed {seed}", unit="step", leave=False):
        rows = torch.randperm(len(states.images))[:BATCH_SIZE]
        image_embeds, text_embeds = embed(model, states.images[rows], states.texts[rows])
        batch = ContrastiveBatch(
            query_embeds=text_embeds,
            target_embeds=image_embeds,
            target_index=own,
            query_ids=own,
            target_ids=own,
            query_modality=modality,
            target_modality=modality,
            logit_scale=model.inverse_temperature(),
        )
        loss = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def measure(model, states: States) -> dict[str, float]:
    """Recall@1 by the names of `MEASURES`."""
    with inference(model):
        images, texts = embed(model, states.images, states.texts)
    own = states.image_of_text.tolist()
    of_image: list[set[int]] = [set() for _ in images]
    for text, image in enumerate(own):
        of_image[image].add(text)
    ranks = (
        retrieval_ranks(texts, images, [{image} for image in own]),
        ranks_of_scores(similarity(texts, images).T, of_image),
        retrieval_ranks(images, texts, of_image),
        retrieval_ranks(images[:, :1], texts, of_image),
    )
    return {name: recall_at(found, 1) for name, found in zip(MEASURES, ranks, strict=True)}


def report(lines: Sequence[Mapping]) -> str:
    """Markdown, a row for each side that asked in training."""
    rows = []
    for asked in OBJECTIVES:
        own = [[line[name] for line in lines if line["asked"] == asked] for name in MEASURES]
        rows.append((asked, *(f"{mean(values):.3f} ± {interval(values):.3f}" for values in own)))
    return markdown_table(("asked in training", *MEASURES), rows)


def main(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint of several vectors, whose towers are used.")] = str(
        CHECKPOINT
    ),
    pairs: Annotated[int, typer.Option(min=BATCH_SIZE, help="Scenes to train on, a caption of each.")] = 1500,
    held_out: Annotated[int, typer.Option(min=10, help="Scenes to measure on.")] = 400,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each.")] = 3,
):
    model, processor = load_checkpoint(checkpoint, "cpu")
    states = states_of_scenes(model, processor, TRAIN_SEED, pairs, captions=1)
    held_out_states = states_of_scenes(model, processor, HELD_OUT_SEED, held_out, captions=None)
    lines = []
    for seed in range(seeds):
        for asked, objective in OBJECTIVES.items():
            heads = train(model.config, states, objective(vector_groups=GROUPS), seed)
            lines.append({"asked": asked, **measure(heads, held_out_states)})

    print(machine_facts(), report(lines), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
