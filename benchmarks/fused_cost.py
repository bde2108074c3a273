"""What a fused embedding costs beside the prefill of the language model that it contains.

    python -m benchmarks.fused_cost [--images 1 --images 4] [--vectors 1 --vectors 16] [--text-tokens 64]

Two comparisons, in time and in counted FLOPs, over numbers of images and of [EMB] vectors:

- The language model: reading an embedding after the visual tokens and the text, against the decoder of the same
  language model on the same vectors, without [EMB]. This is the part that a fused embedding adds to.
- From pixels: `get_multimodal_features` against `forward` on the same prompt, as `generate` calls it before it writes
  the first token: vision tower, decoder, the vocabulary head at the last place.

All steps of a round follow one another; ratios are medians over rounds.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm

from benchmarks.measure import count_flops, machine_facts, markdown_table, median_ratio, time_alternately
from benchmarks.setting import IMAGE_TOKEN_ID, Setting, build_batch, build_model
from mmgem import MMGEMModel
from mmgem.training.inference import inference

LIMIT = 1.15  # of the language model's prefill
READ, PREFILL, FUSED, PROMPT = "read", "prefill", "fused", "prompt"
HEADER = (
    *("images", "tokens", "[EMB]", "prefill, s", "of it: time", "FLOPs", f"at most {LIMIT}"),
    *("from pixels, s", "of it: time", "FLOPs"),
)


def build_steps(model: MMGEMModel, setting: Setting, num_images: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """Build the steps that are compared.

    Args:
        model: In evaluation mode.
        setting: Of its size; `num_images` is the number of inputs here.
        num_images: In each input, before its text of `caption_lengths[1]` tokens.

    Returns:
        The four steps, each returning what it computes, and the tokens of an input, without [EMB].
    """
    inputs = setting.num_images
    batch = build_batch(replace(setting, num_images=inputs * num_images))
    text = batch["input_ids"][:inputs].clamp(min=IMAGE_TOKEN_ID + 1)  # no padding: every input is as long
    placeholders = text.new_full((inputs, num_images * setting.num_visual_tokens), IMAGE_TOKEN_ID)
    input_ids = torch.cat([placeholders, text], dim=1)  # (B, L)
    attention_mask, pixel_values = torch.ones_like(input_ids), batch["pixel_values"]
    prompt = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
    with inference(model):
        inputs_embeds = model.embed_prompt(input_ids, pixel_values)  # (B, L, H)
    steps: dict[str, Callable[[], Any]] = {
        PREFILL: lambda: model.language_model.get_decoder()(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        ),
        READ: lambda: model._embed_sequences(inputs_embeds, attention_mask),
        PROMPT: lambda: model(**prompt, logits_to_keep=1),
        FUSED: lambda: model.get_multimodal_features(**prompt),
    }
    return steps, input_ids.shape[1]


def compare(setting: Setting, numbers_of_images: Sequence[int], numbers_of_vectors: Sequence[int], rounds: int) -> str:
    """The table of the benchmark, as markdown."""
    rows = []
    for vectors in tqdm(numbers_of_vectors, desc="vectors"):
        model = build_model(setting, num_embedding_tokens=vectors, embedding_pooling="mean").eval()
        for num_images in tqdm(numbers_of_images, desc="images", leave=False):
            steps, tokens = build_steps(model, setting, num_images)
            with inference(model):
                flops = {name: count_flops(step) for name, step in steps.items()}  # which warms up, too
                seconds = time_alternately(steps, rounds)
            read_time, read_flops = median_ratio(seconds[READ], seconds[PREFILL]), flops[READ] / flops[PREFILL]
            rows.append(
                (
                    *(num_images, tokens, vectors, f"{statistics.median(seconds[PREFILL]):.3f}"),
                    *(f"{read_time:.3f}", f"{read_flops:.3f}", "yes" if max(read_time, read_flops) <= LIMIT else "no"),
                    f"{statistics.median(seconds[PROMPT]):.3f}",
                    f"{median_ratio(seconds[FUSED], seconds[PROMPT]):.3f}",
                    f"{flops[FUSED] / flops[PROMPT]:.3f}",
                )
            )
    return "\n\n".join(
        [
            f"{setting.num_images} inputs at a time; {setting.num_visual_tokens} visual tokens of an image of "
            f"{setting.num_patches} patches, texts of {setting.caption_lengths[1]} tokens; float32; {rounds} rounds.",
            markdown_table(HEADER, rows),
        ]
    )


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measured runs of each step.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 4,
    images: Annotated[list[int], typer.Option(min=1, help="Of an input; may be given again.")] = [1, 4],  # noqa: B006
    vectors: Annotated[list[int], typer.Option(min=1, help="[EMB] vectors; may be given again.")] = [1, 4, 16],  # noqa: B006
    text_tokens: Annotated[int, typer.Option(min=1, help="Of the text after the images.")] = 64,
    visual_tokens: Annotated[int, typer.Option(help="Of an image; a square number.")] = 16,
):
    lengths = text_tokens, text_tokens
    setting = replace(Setting(), num_images=batch_size, num_visual_tokens=visual_tokens, caption_lengths=lengths)
    print(machine_facts(), compare(setting, images, vectors, rounds), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
