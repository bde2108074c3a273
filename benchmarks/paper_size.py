"""MM-GEM at the paper's size on one accelerator: CLIP ViT-L/14 at 336 pixels and TinyLlama 1.1B, random weights, bf16.

    python -m benchmarks.paper_size

Prints how the joint step, the embedding of images and texts, and the writing of captions grow with the batch, and the
joint step with the length of texts: time, FLOP/s, the share of what the machine reaches in one large matrix product
(MFU), and memory beside that of weights and optimizer. Two choices stand beside the default: flex attention for the
packed rows of the joint step, and captions with a static cache, whose decoding step is compiled into a CUDA graph.
Times are medians of steps that the accelerator has finished.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import (
    count_flops,
    machine_facts,
    markdown_table,
    peak_memory,
    synchronized,
    time_alternately,
)
from benchmarks.setting import IMAGE_TOKEN_ID, Setting, build_batch, build_model, paper_setting
from benchmarks.training_step import TrainingStep
from mmgem import MMGEMModel
from mmgem.training.inference import inference

GEMM_SIZE = 8192
CAPTION_TOKENS = 20
Row = tuple[object, ...]


def seconds_of(step: Callable[[], Any], rounds: int, device: str) -> float:
    """The median time of a step, after one that warms up."""
    timed = synchronized(step, device)
    timed()
    return statistics.median(time_alternately({"": timed}, rounds)[""])


def gemm_rate(device: str, dtype: torch.dtype, size: int, rounds: int) -> float:
    """FLOP/s of one large matrix product of random numbers."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, rounds, device)


def joint_steps(
    model: MMGEMModel,
    setting: Setting,
    batch_sizes: Sequence[int],
    text_lengths: Sequence[int],
    measure: Callable[..., Row],
    attention: str = "flex_attention",
) -> Iterator[Row]:
    """Forward, backward and AdamW, in float32 weights under bfloat16 autocast: by batch, then the first batch by the
    tokens of the longest text, with the default attention and with another one.
    """

    def step_of(size: int, longest: int) -> TrainingStep:
        lengths = setting.caption_lengths[0], longest
        batch = _batch(replace(setting, caption_lengths=lengths), size, model.device)
        return TrainingStep(model, lambda: model(**batch, return_loss=True).loss, bf16=True)

    for size in batch_sizes:
        yield measure("joint step", size, step := step_of(size, setting.caption_lengths[1]))
        step.optimizer.zero_grad()
    size, default = batch_sizes[0], model.language_model.config._attn_implementation
    counts: dict[int, int] = {}
    for name in (default, attention):
        model.set_attn_implementation({"text_config": name})
        for longest in text_lengths:
            step = step_of(size, longest)
            if longest not in counts:  # of the default: the counter does not know every kernel
                counts[longest] = count_flops(step)
            yield measure(f"joint step, texts of up to {longest} tokens, {name}", size, step, counts[longest])
            step.optimizer.zero_grad()
    model.set_attn_implementation({"text_config": default})


def uses(
    model: MMGEMModel, setting: Setting, batch_sizes: Sequence[int], measure: Callable[..., Row]
) -> Iterator[Row]:
    """Embedding and writing, in bfloat16, which the weights become."""
    device = model.to(torch.bfloat16).device
    lengths = {"max_new_tokens": CAPTION_TOKENS, "min_new_tokens": CAPTION_TOKENS}
    with inference(model):
        for size in batch_sizes:
            batch = _batch(setting, size, device)
            pixel_values = batch.pop("pixel_values").to(torch.bfloat16)
            yield measure("embed images", size, partial(model.get_image_features, pixel_values))
            yield measure("embed texts", size, partial(model.get_text_features, **batch))
            prompt = torch.full((size, setting.num_visual_tokens), IMAGE_TOKEN_ID, device=device)
            write = partial(model.generate, prompt, pixel_values=pixel_values, **lengths)
            yield measure("write captions", size, write)
            as_graph = partial(write, cache_implementation="static")
            yield measure("write captions, static cache", size, as_graph, count_flops(write))


def _batch(setting: Setting, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in build_batch(replace(setting, num_images=size)).items()}


def measured(
    name: str,
    size: int,
    step: Callable[[], Any],
    flops: int | None = None,
    *,
    rounds: int,
    ceiling: float,
    device: str,
) -> Row:
    """A row of the table; FLOPs are counted where they are not given, and a batch that does not fit into memory has no
    figures.
    """
    try:
        seconds = seconds_of(step, rounds, device)
        memory, flops = peak_memory(step, device), flops or count_flops(step)
    except torch.OutOfMemoryError:
        return (name, size, "out of memory", "", "", "", "")
    rate = flops / seconds
    cells = f"{seconds * 1e3:.1f}", f"{size / seconds:.0f}", f"{rate / 1e12:.1f}", f"{rate / ceiling:.2f}"
    return (name, size, *cells, f"{memory / 1e9:.1f}")


def main(
    batch_sizes: Annotated[str, typer.Option(help="Images or texts at a time, with commas between.")] = "8,32,64",
    text_lengths: Annotated[str, typer.Option(help="Tokens of the longest text, with commas between.")] = "60,240",
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each.")] = 5,
):
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device; expected one (`benchmarks.joint_step` is for CPUs).")
    device, setting = "cuda", paper_setting()
    ceiling = gemm_rate(device, torch.bfloat16, GEMM_SIZE, rounds)
    sizes, lengths = ([int(number) for number in text.split(",")] for text in (batch_sizes, text_lengths))
    measure = partial(measured, rounds=rounds, ceiling=ceiling, device=device)
    model = build_model(setting).to(device)
    rows = [*joint_steps(model, setting, sizes, lengths, measure), *uses(model, setting, sizes, measure)]
    print(machine_facts(device))
    print(f"\none product of {GEMM_SIZE} x {GEMM_SIZE} matrices in bfloat16: {ceiling / 1e12:.0f} TFLOP/s\n")
    print(markdown_table(("work", "batch", "ms", "a second", "TFLOP/s", "MFU", "GB beside the weights"), rows))


if __name__ == "__main__":
    typer.run(main)
