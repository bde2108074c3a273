"""How many embeddings a second, by what is embedded and how.

    python -m benchmarks.encoding [--batch-size 12] [--vectors 16] [--visual-tokens 16]

Prints inputs and vectors per second, and the counted FLOPs of one input, for images, texts and images with texts, each
as one vector and as several. Preprocessing and tokenizing are not in it. All modes of a round follow one another.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, NamedTuple

import torch
import typer

from benchmarks.measure import count_flops, machine_facts, markdown_table, median_ratio, time_alternately
from benchmarks.setting import IMAGE_TOKEN_ID, Setting, build_batch, build_model
from mmgem.training.inference import inference

IMAGE, TEXT, FUSED = "image", "text", "image with text"
HEADER = ("embedded", "vectors of each", "inputs/s", "vectors/s", "time of one image vector", "GFLOP of an input")


class Mode(NamedTuple):
    """What is embedded, and as how many vectors."""

    embedded: str
    vectors: int


def encoders(setting: Setting, vectors: int) -> dict[Mode, Callable[[], torch.Tensor]]:
    """For each mode a function that embeds the same batch of `setting.num_images` inputs and returns the embeddings,
    (B, D) or (B, k, D). Texts are padded to the longest, as in a batch that is not sorted by length.
    """
    batch = build_batch(setting)
    texts = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    images = {"pixel_values": batch["pixel_values"]}
    placeholders = texts["input_ids"].new_full((setting.num_images, setting.num_visual_tokens), IMAGE_TOKEN_ID)
    fused = images | {
        "input_ids": torch.cat([placeholders, texts["input_ids"]], dim=1),  # (B, n + L)
        "attention_mask": torch.cat([torch.ones_like(placeholders), texts["attention_mask"]], dim=1),
    }
    pooling = {1: "last", vectors: "multi_vector"}
    found: dict[Mode, Callable[[], torch.Tensor]] = {}
    for count in sorted(pooling):
        model = build_model(setting, num_embedding_tokens=count, embedding_pooling=pooling[count]).eval()
        found[Mode(IMAGE, count)] = partial(_embed, model, model.get_image_features, images)
        found[Mode(TEXT, count)] = partial(_embed, model, model.get_text_features, texts)
        found[Mode(FUSED, count)] = partial(_embed, model, model.get_multimodal_features, fused)
    return found


def _embed(model, features: Callable, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with inference(model):
        return features(**inputs).pooler_output


def compare(setting: Setting, vectors: int, rounds: int) -> str:
    """The table of the benchmark, as markdown; `vectors`, at least 2, are those of the modes with several."""
    steps = encoders(setting, vectors)
    flops = {mode: count_flops(step) for mode, step in steps.items()}  # which warms up, too
    seconds = time_alternately(steps, rounds)
    rows = []
    for mode, times in seconds.items():
        per_second = setting.num_images / statistics.median(times)
        rows.append(
            (
                mode.embedded,
                mode.vectors,
                f"{per_second:.1f}",
                f"{per_second * mode.vectors:.1f}",
                f"{median_ratio(times, seconds[Mode(IMAGE, 1)]):.2f}",
                f"{flops[mode] / setting.num_images / 1e9:.2f}",
            )
        )
    return "\n\n".join(
        [
            f"{setting.num_images} inputs at a time; images of {setting.num_patches} patches, "
            f"{setting.num_visual_tokens} visual tokens; texts of {setting.caption_lengths[0]} to "
            f"{setting.caption_lengths[1]} tokens; float32; {rounds} rounds.",
            markdown_table(HEADER, rows),
        ]
    )


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each mode.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 12,
    vectors: Annotated[int, typer.Option(min=2, help="Of each input, where it has several.")] = 16,
    visual_tokens: Annotated[int, typer.Option(help="Visual tokens of an image, a square number.")] = 16,
):
    setting = replace(Setting(), num_images=batch_size, num_visual_tokens=visual_tokens)
    print(machine_facts(), compare(setting, vectors, rounds), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
