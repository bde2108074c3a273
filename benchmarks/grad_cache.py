"""GradCache: what a contrastive batch costs in memory as it grows, and in time beside the plain step.

    python -m benchmarks.grad_cache

Prints the peak memory of `MMGEMTrainer.training_step` with and without `grad_cache_chunk_size`, over the batch itself,
and the time of both at one batch size.
"""

import statistics
import tempfile
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from transformers import default_data_collator

from benchmarks.measure import machine_facts, markdown_table, median_ratio, peak_memory, time_alternately
from benchmarks.setting import Setting, build_batch, build_model
from mmgem import MMGEMModel
from mmgem.text_rows import IGNORED_LABEL
from mmgem.training.trainer.arguments import MMGEMTrainingArguments
from mmgem.training.trainer.trainer import MMGEMTrainer


def small_setting() -> Setting:
    """Towers small enough to run 4,096 images within a minute on two cores; 32 images are a chunk."""
    towers = {"hidden_size": 128, "num_attention_heads": 2}
    vision = {"intermediate_size": 512, "num_hidden_layers": 3, "image_size": 64, "patch_size": 8}
    text = {"intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 2000, "max_position_embeddings": 128}
    return Setting(num_images=32, projection_dim=128, vision=towers | vision, text=towers | text)


def build_trainer(model: MMGEMModel, chunk_size: int | None, folder: str) -> MMGEMTrainer:
    """A trainer whose `training_step` is measured."""
    arguments = MMGEMTrainingArguments(
        output_dir=folder, use_cpu=True, report_to="none", grad_cache_chunk_size=chunk_size
    )
    trainer = MMGEMTrainer(model, arguments, processing_class=None, data_collator=default_data_collator)
    trainer.current_gradient_accumulation_steps = 1  # set by `train`, which is not called here
    return trainer


def build_inputs(setting: Setting, num_chunks: int) -> dict:
    """A batch as the collator gives it, of `num_chunks * setting.num_images` images; all chunks equally long."""
    chunks = [build_batch(setting, seed) for seed in range(num_chunks)]
    batch = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    index = torch.arange(len(batch["input_ids"]))
    return {
        **batch,
        "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL),
        "image_index": index,
        "box_index": torch.full_like(index, -1),
        "contrastive_mask": index >= 0,
        "return_loss": True,
    }


def compare(setting: Setting, numbers_of_chunks: Sequence[int], plain_up_to: int, rounds: int) -> str:
    """The tables of the benchmark, as markdown.

    Args:
        setting: `num_images` are a chunk.
        numbers_of_chunks: In a batch.
        plain_up_to: Chunks of the largest batch that the plain step is measured on, and of the batch for the time.
        rounds: Of the time.
    """
    model, chunk_size = build_model(setting), setting.num_images
    with tempfile.TemporaryDirectory() as folder:
        cached, plain = build_trainer(model, chunk_size, folder), build_trainer(model, None, folder)

        def memory_of(trainer: MMGEMTrainer, inputs: dict) -> int:
            model.zero_grad()
            return peak_memory(lambda: trainer.training_step(model, dict(inputs)))

        rows = []
        for num_chunks in numbers_of_chunks:
            inputs = build_inputs(setting, num_chunks)
            inputs_memory = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
            cached_memory = memory_of(cached, inputs)
            plain_memory = f"{memory_of(plain, inputs) / 1e6:.1f}" if num_chunks <= plain_up_to else "-"
            figures = (f"{cached_memory / 1e6:.1f}", f"{(cached_memory + inputs_memory) / 1e6:.1f}")
            rows.append((f"{num_chunks * chunk_size:,}", plain_memory, *figures))

        def step(trainer: MMGEMTrainer):
            trainer.training_step(model, dict(inputs))
            model.zero_grad()

        inputs = build_inputs(setting, plain_up_to)
        seconds = time_alternately({"plain": lambda: step(plain), "cached": lambda: step(cached)}, rounds)
    header = ("images", "plain, MB", f"chunks of {chunk_size}, MB", "with the images and texts, MB")
    times = [(name, f"{statistics.median(values):.2f}") for name, values in seconds.items()]
    times.append(("ratio", f"{median_ratio(seconds['cached'], seconds['plain']):.2f}"))
    return "\n\n".join(
        [
            f"Peak memory, float32, the gradients of {model.num_parameters() / 1e6:.1f} M weights included.",
            markdown_table(header, rows),
            markdown_table((f"{plain_up_to * chunk_size} images, {rounds} rounds", "s"), times),
        ]
    )


def main(rounds: Annotated[int, typer.Option(help="Measured runs of each step.")] = 5):
    print(machine_facts(), compare(small_setting(), (1, 4, 16, 128), plain_up_to=16, rounds=rounds), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
