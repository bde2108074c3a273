"""The joint step against the two-model stack it replaces, and against itself written plainly in two passes.

    python -m benchmarks.joint_step [--size laptop] [--threads 1] [--bf16] [--visual-tokens 64]

Prints time, counted FLOPs and peak memory of each, and which share of the machine's GEMM rate the joint step reaches.
A step is forward, backward and AdamW. All steps of a round follow one another; ratios are medians over rounds.
"""

import statistics
from dataclasses import replace
from typing import Annotated

import torch
import typer

from benchmarks.measure import (
    count_flops,
    gemm_rates,
    machine_facts,
    markdown_table,
    median_ratio,
    quietest_clock,
    time_alternately,
)
from benchmarks.setting import SETTINGS, Setting, Size, build_batch, build_model
from benchmarks.training_step import TrainingStep
from benchmarks.two_model_stack import build_clip, build_llava, clip_inputs, llava_inputs
from benchmarks.two_pass import two_pass_losses

JOINT, TWO_PASSES = "joint step, packed", "joint step, two padded passes"
CLIP, LLAVA = "CLIPModel", "LlavaForConditionalGeneration"
STACK = "two-model stack"
HEADER = ("step", "s", "of the stack", "TFLOP", "of the stack", "peak GB", "of the stack", "GB with weights, AdamW")


def compare(setting: Setting, rounds: int, bf16: bool) -> str:
    """The tables of the benchmark, as markdown."""
    batch = build_batch(setting)
    model, clip, llava = build_model(setting), build_clip(setting), build_llava(setting)
    model._check_reading()  # which its first step does
    clip_batch, llava_batch = clip_inputs(batch), llava_inputs(batch, llava)
    steps = {
        JOINT: TrainingStep(model, lambda: model(**batch, return_loss=True).loss, bf16),
        TWO_PASSES: TrainingStep(model, lambda: sum(two_pass_losses(model, **batch)), bf16),
        CLIP: TrainingStep(clip, lambda: clip(**clip_batch, return_loss=True).loss, bf16),
        LLAVA: TrainingStep(llava, lambda: llava(**llava_batch).loss, bf16),
    }
    flops, memory, total_memory = {}, {}, {}
    for name, step in steps.items():  # these runs warm up, too
        flops[name] = count_flops(step)
        memory[name] = step.peak_memory()
        total_memory[name] = memory[name] + step.resident_memory()
    seconds = time_alternately(steps, rounds, quietest_clock())
    fastest_gemm, step_gemm = gemm_rates(steps[JOINT])

    # One after the other, both models in memory all the time.
    seconds[STACK] = [a + b for a, b in zip(seconds[CLIP], seconds[LLAVA], strict=True)]
    flops[STACK] = flops[CLIP] + flops[LLAVA]
    memory[STACK] = max(memory[CLIP], memory[LLAVA])
    total_memory[STACK] = memory[STACK] + steps[CLIP].resident_memory() + steps[LLAVA].resident_memory()

    rows = [
        (
            name,
            f"{statistics.median(seconds[name]):.2f}",
            f"{median_ratio(seconds[name], seconds[STACK]):.2f}",
            f"{flops[name] / 1e12:.3f}",
            f"{flops[name] / flops[STACK]:.2f}",
            f"{memory[name] / 1e9:.2f}",
            f"{memory[name] / memory[STACK]:.2f}",
            f"{total_memory[name] / 1e9:.2f} ({total_memory[name] / total_memory[STACK]:.2f})",
        )
        for name in (JOINT, TWO_PASSES, CLIP, LLAVA, STACK)
    ]
    achieved = flops[JOINT] / statistics.median(seconds[JOINT])
    gemm_rows = [
        ("joint step", f"{achieved / 1e9:.0f}", ""),
        ("its own matrix products, each alone", f"{step_gemm / 1e9:.0f}", f"{achieved / step_gemm:.2f}"),
        ("the fastest of them", f"{fastest_gemm / 1e9:.0f}", f"{achieved / fastest_gemm:.2f}"),
    ]
    return "\n\n".join(
        [
            f"{setting.num_images} images of {setting.num_patches} patches, of which MM-GEM makes "
            f"{setting.num_visual_tokens} visual tokens; captions of {setting.caption_lengths[0]} to "
            f"{setting.caption_lengths[1]} tokens; {'bfloat16 autocast' if bf16 else 'float32'}; {rounds} rounds.",
            markdown_table(HEADER, rows),
            markdown_table(("rate", "GFLOP/s", "joint step reaches"), gemm_rows),
        ]
    )


def main(
    rounds: Annotated[int, typer.Option(help="Measured runs of each step.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Images, one caption each.")] = 12,
    visual_tokens: Annotated[int, typer.Option(help="Visual tokens of an image, for MM-GEM.")] = 16,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    size: Annotated[Size, typer.Option(help="Of the towers.")] = Size.half,
    threads: Annotated[int, typer.Option(min=0, help="Of torch; 0 leaves them as they are.")] = 0,
):
    if threads:
        torch.set_num_threads(threads)
    setting = replace(SETTINGS[size](), num_images=batch_size, num_visual_tokens=visual_tokens)
    print(machine_facts(), compare(setting, rounds, bf16), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
