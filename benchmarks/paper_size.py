"""MM-GEM at the paper's size on one accelerator: CLIP ViT-L/14 at 336 pixels and TinyLlama 1.1B, random weights, bf16.

    python -m benchmarks.paper_size

Prints how the joint step, the embedding of images and texts, and the writing of captions grow with the batch: time,
FLOP/s, the share of what the machine reaches in one large matrix product (MFU), and peak memory. Times are medians of
steps that the accelerator has finished.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import count_flops, machine_facts, markdown_table
from benchmarks.setting import IMAGE_TOKEN_ID, Setting, build_batch, build_model
from mmgem import MMGEMModel
from mmgem.training.inference import inference

GEMM_SIZE = 8192
CAPTION_TOKENS = 20
Row = tuple[object, ...]


def paper_setting() -> Setting:
    """The towers of the paper; 64 visual tokens of 576 patches."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    text = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    }
    return Setting(num_visual_tokens=64, projection_dim=1024, vision=vision, text=text)


def seconds_of(step: Callable[[], Any], rounds: int) -> float:
    """The median time of a step, after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        _wait()
        start = time.perf_counter()
        step()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait() -> None:
    if torch.accelerator.is_available():  # tests are on CPUs
        torch.accelerator.synchronize()


def peak_gigabytes(step: Callable[[], Any]) -> float:
    """The most memory that is allocated during a step on an accelerator, weights included."""
    if not torch.accelerator.is_available():
        return math.nan
    torch.accelerator.reset_peak_memory_stats()
    step()
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated() / 1e9


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> float:
    """FLOP/s of one large matrix product of random numbers."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, rounds)


def joint_steps(
    model: MMGEMModel, setting: Setting, batch_sizes: Sequence[int], measure: Callable[..., Row]
) -> Iterator[Row]:
    """Forward, backward and AdamW, in float32 weights under bfloat16 autocast."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    for size in batch_sizes:
        batch = _batch(setting, size, device)

        def step(batch=batch):
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**batch, return_loss=True).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        yield measure("joint step", size, step)
        optimizer.zero_grad()


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


def _batch(setting: Setting, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in build_batch(replace(setting, num_images=size)).items()}


def measured(name: str, size: int, step: Callable[[], Any], rounds: int, ceiling: float) -> Row:
    """A row of the table; a batch that does not fit into memory has no figures."""
    try:
        seconds = seconds_of(step, rounds)
        memory, flops = peak_gigabytes(step), count_flops(step)
    except torch.OutOfMemoryError:
        return (name, size, "out of memory", "", "", "", "")
    rate = flops / seconds
    cells = f"{seconds * 1e3:.1f}", f"{size / seconds:.0f}", f"{rate / 1e12:.1f}", f"{rate / ceiling:.2f}"
    return (name, size, *cells, f"{memory:.1f}")


def main(
    batch_sizes: Annotated[str, typer.Option(help="Images or texts at a time, with commas between.")] = "8,32,64",
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each.")] = 5,
):
    if not torch.accelerator.is_available():
        raise typer.BadParameter("there is no accelerator; expected one (`benchmarks.joint_step` is for CPUs).")
    device = torch.accelerator.current_accelerator()
    assert device is not None
    setting = paper_setting()
    ceiling = gemm_rate(device, torch.bfloat16, GEMM_SIZE, rounds)
    sizes = [int(size) for size in batch_sizes.split(",")]
    measure = partial(measured, rounds=rounds, ceiling=ceiling)
    model = build_model(setting).to(device)
    rows = [*joint_steps(model, setting, sizes, measure), *uses(model, setting, sizes, measure)]
    print(machine_facts(), torch.cuda.get_device_name() if device.type == "cuda" else device.type, sep="; ")
    print(f"\none product of {GEMM_SIZE} x {GEMM_SIZE} matrices in bfloat16: {ceiling / 1e12:.0f} TFLOP/s\n")
    print(markdown_table(("work", "batch", "ms", "a second", "TFLOP/s", "MFU", "peak GB"), rows))


if __name__ == "__main__":
    typer.run(main)
