"""What batches by a number of tokens save where texts of many lengths are embedded.

    python -m benchmarks.text_batches [--texts 1024] [--rounds 7]

Embeds the same texts of 5 to 60 words with mmgem-tiny: in batches of 64 as they come, in batches of 64 sorted by
length, in those of `embed_texts`, sorted, of 512 to 4,096 tokens, and by `SentenceTransformer.encode`; and as ready
tensors of 512 tokens, which need no tokenizing and no order. All modes of a round follow one another. Time is that of
the processor, of one thread, so that other work on the machine counts little.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.measure import machine_facts, markdown_table, median_ratio, time_alternately
from mmgem.processing.token_batches import TOKENS_ON_CPU, batches_of_tokens
from mmgem.training.inference import embed_texts, inference

TINY = Path(__file__).parent.parent / "model_cards" / "mmgem-tiny"
LENGTHS = (5, 60)
BATCH_SIZE = 64
BATCH_TOKENS = (512, 1024, 2048, 4096)
ENCODE_BATCH_SIZES = (32, 256)  # the first is the default
WORDS = (
    "red",
    "star",
    "a",
    "blue",
    "circle",
    "on",
    "the",
    "left",
    "large",
    "small",
    "and",
    "moon",
    "striped",
    "square",
)
HEADER = ("batches", "texts/s", "time of batches as they come", "quartiles")


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of words, of all lengths alike."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(*LENGTHS))) for _ in range(count)]


def embed_by_size(model, processor, texts: Sequence[str]) -> torch.Tensor:
    """Embeds `BATCH_SIZE` texts at a time, padded to the longest of them; returns them as they come."""
    parts = []
    for start in range(0, len(texts), BATCH_SIZE):
        inputs = processor(text=list(texts[start : start + BATCH_SIZE]), padding=True, return_tensors="pt")
        with inference(model):
            parts.append(model.get_text_features(**inputs).pooler_output)
    return torch.cat(parts)


def embed_ready(model, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Embeds tensors that are there already, as good as a loop can be."""
    with inference(model):
        return torch.cat([model.get_text_features(**inputs).pooler_output for inputs in batches])


def compare(encoder, count: int, rounds: int) -> str:
    """The table of the benchmark, as markdown, with the model of an encoder of sentence-transformers."""
    model, processor = encoder[0].model, encoder[0].processor
    texts = make_texts(count)
    lengths = [len(ids) for ids in processor(text=texts, padding=False)["input_ids"]]
    batches = batches_of_tokens(lengths, TOKENS_ON_CPU)
    ready = [dict(processor(text=[texts[row] for row in batch], return_tensors="pt")) for batch in batches]
    modes: dict[str, Callable[[], torch.Tensor]] = {
        f"{BATCH_SIZE} texts as they come": partial(embed_by_size, model, processor, texts),
        f"{BATCH_SIZE} texts, sorted": partial(embed_by_size, model, processor, sorted(texts, key=len, reverse=True)),
    }
    for count_of_tokens in BATCH_TOKENS:
        modes[f"{count_of_tokens} tokens, sorted"] = partial(embed_texts, model, processor, texts, count_of_tokens)
    for batch_size in ENCODE_BATCH_SIZES:
        modes[f"`encode`, batch_size={batch_size}"] = partial(encoder.encode, texts, batch_size=batch_size)
    modes[f"{TOKENS_ON_CPU} tokens, ready tensors"] = partial(embed_ready, model, ready)
    for embed in modes.values():
        embed()  # warms up
    seconds = time_alternately(modes, rounds, clock=time.process_time)
    unsorted = next(iter(seconds.values()))
    rows = []
    for name, times in seconds.items():
        ratios = [own / other for own, other in zip(times, unsorted, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        ratio = f"{median_ratio(times, unsorted):.2f}"
        rows.append((name, f"{count / statistics.median(times):.0f}", ratio, f"{low:.2f} to {high:.2f}"))
    return markdown_table(HEADER, rows)


def main(
    texts: Annotated[int, typer.Option(min=BATCH_SIZE, help="How many are embedded.")] = 1024,
    rounds: Annotated[int, typer.Option(min=2, help="Measured runs of each mode.")] = 7,
):
    torch.set_num_threads(1)
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(TINY), trust_remote_code=True, device="cpu")
    print(machine_facts(), compare(encoder, texts, rounds), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
