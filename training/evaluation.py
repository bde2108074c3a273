"""What a model is worth on a set of images: retrieval, zero-shot classification, captions, and regions."""

import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm

from mmgem.training.data.grammar import label_prompt, parse_caption, parse_region_caption
from mmgem.training.data.scenes import LABELS
from mmgem.training.encoding import (
    embed_images,
    embed_regions,
    embed_texts,
    generate_captions,
    generate_region_captions,
)
from mmgem.training.sharing import Share

RECALL_AT = (1, 5, 10)
_MAX_SCORES = 2**24  # scores held at a time


# ------------------------------------------------------------------------------------------------------- pure metrics


def retrieval_ranks(queries: torch.Tensor, gallery: torch.Tensor, right: Sequence[Collection[int]]) -> torch.Tensor:
    """For each query, how many wrong gallery rows come before its best right one.

    A wrong row that scores the same as the right one counts as before it: embeddings that are all equal find nothing.

    Args:
        queries: (Q, D).
        gallery: (G, D); the score is the dot product.
        right: For each query the gallery rows that are right, at least one.

    Returns:
        (Q,) int64, 0 is best.

    Raises:
        ValueError: If the sizes do not fit, or a query has no right row.
    """
    if len(right) != len(queries):
        raise ValueError(f"right must have one entry for each of the {len(queries)} queries, got {len(right)}")
    if empty := [number for number, rows in enumerate(right) if not rows]:
        raise ValueError(f"right must name at least one gallery row for each query, got none for query {empty[0]}")
    ranks = []
    # A part of the queries at a time: all scores of 100,000 x 100,000 would be 40 GB.
    step = max(1, _MAX_SCORES // len(gallery))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ gallery.T  # (step, G)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        for row, columns in enumerate(right[start : start + step]):
            is_right[row, list(columns)] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        # `not <` rather than `>=`: a row of NaN is then as wrong as can be.
        ranks.append((~(scores < best) & ~is_right).sum(dim=1))
    return torch.cat(ranks)


def recall_at(ranks: torch.Tensor, k: int) -> float:
    """The share of queries with a right row among their first `k`, from the ranks of `retrieval_ranks`."""
    return (ranks < k).double().mean().item()


def agreement(predictions: Sequence[Hashable], references: Sequence[Hashable]) -> float:
    """The share of predictions that equal their reference."""
    return sum(a == b for a, b in zip(predictions, references, strict=True)) / len(references)


def caption_fidelity(captions: Sequence[str], references: Sequence[str]) -> float | None:
    """The share of captions that speak of exactly the objects their reference speaks of, in whatever words.

    Returns:
        0 to 1 over the references that are captions of scenes, or None where none is.
    """
    return _fidelity(captions, references, parse_caption)


def region_caption_fidelity(captions: Sequence[str], references: Sequence[str]) -> float | None:
    """As `caption_fidelity`, for captions of regions."""
    return _fidelity(captions, references, parse_region_caption)


def _fidelity(captions, references, parse) -> float | None:
    meanings = [(parse(caption), parse(reference)) for caption, reference in zip(captions, references, strict=True)]
    judged = [pair for pair in meanings if pair[1] is not None]
    return agreement(*zip(*judged, strict=True)) if judged else None


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al., 2015, arXiv:1411.5726) over lower-cased words without punctuation.

    Args:
        captions: One caption for each image.
        references: The reference captions of each image.

    Returns:
        The mean over images, 0 to 10; papers print it times 100. It depends on the whole set: a word weighs by how few
        images have it in their references.

    Raises:
        ValueError: If there are fewer than two images: every word is then in all of them, and weighs nothing.
        ImportError: If pycocoevalcap is not installed (`pip install mmgem[eval]`).
    """
    if len(captions) != len(references):
        raise ValueError(
            f"references must have one entry for each of the {len(captions)} captions, got {len(references)}"
        )
    if len(captions) < 2:
        raise ValueError(f"captions must be of 2 images or more, CIDEr weighs words by image; got {len(captions)}")
    from pycocoevalcap.cider.cider import Cider

    candidates = {number: [_words(caption)] for number, caption in enumerate(captions)}
    originals = {number: [_words(text) for text in texts] for number, texts in enumerate(references)}
    return float(Cider().compute_score(originals, candidates)[0])


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate_model(
    model,
    processor,
    dataset,
    batch_size: int = 64,
    max_new_tokens: int = 128,
    samples: list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Measures a model on rows of images; what the rows do not have is not measured.

    | metric | columns | what it is |
    |---|---|---|
    | `text_to_image_recall@k` | `captions` | every caption searches the images; k is 1, 5, 10 |
    | `image_to_text_recall@k` | `captions` | every image searches the captions; any of its own is right |
    | `long_text_to_image_recall@1` | `long_caption` | |
    | `zero_shot_accuracy` | `label` | among all classes of scenes, or those of the rows if they have others |
    | `caption_fidelity` | `captions` | generated captions that speak of exactly the right objects (scenes only) |
    | `cider` | `captions` | of the generated captions; needs pycocoevalcap |
    | `region_recall@1` | `boxes`, `region_captions` | every region caption searches all regions of all images |
    | `region_caption_fidelity` | `boxes`, `region_captions` | as `caption_fidelity`, for each box |

    A text that several images share is right for each of them; so is a region caption for regions of the same meaning.

    In a distributed run all processes call this with the same rows; each embeds and captions its share of them, and
    all return the metrics of the whole (see [`mmgem.training.sharing.Share`]).

    Args:
        model: An `MMGEMModel`, on any device; its training mode is the same afterwards.
        processor: Its `MMGEMProcessor`.
        dataset: Any iterable of rows: dicts with `image` and any of the columns above; a single caption may also be
            called `text`.
        batch_size: Images or texts at a time.
        max_new_tokens: The length at which a generated caption is cut.
        samples: If given, receives for each row `caption` and, with boxes, `region_captions`, as generated.

    Returns:
        Metric name to value.

    Raises:
        ValueError: If there are fewer than two rows, so that there is nothing to choose from, or a row has not as many
            `boxes` as `region_captions`.
    """
    share = Share.for_model(model)
    answers = share.gather(_answers(model, processor, share.of(dataset), batch_size, max_new_tokens))
    if len(answers) < 2:
        raise ValueError(f"dataset must have 2 rows or more, got {len(answers)}")

    embed = partial(_embed_texts, model, processor, batch_size, share)
    rows = [answer.row for answer in answers]
    image_embeds = torch.stack([answer.image_embed for answer in answers])  # (I, D)
    captions = [answer.caption for answer in answers if answer.caption is not None]
    region_captions = [caption for answer in answers for caption in answer.region_captions]
    references = [_captions_of(row) for row in rows]
    long_captions = [[row["long_caption"]] if row.get("long_caption") else [] for row in rows]
    labels = [row["label"] for row in rows if row.get("label") is not None]
    metrics: dict[str, float | None] = {}
    if captions:
        text_ranks, image_ranks = _ranks_both_ways(image_embeds, references, embed)
        metrics |= {f"text_to_image_recall@{k}": recall_at(text_ranks, k) for k in RECALL_AT}
        metrics |= {f"image_to_text_recall@{k}": recall_at(image_ranks, k) for k in RECALL_AT}
    if any(long_captions):
        metrics["long_text_to_image_recall@1"] = recall_at(_ranks_both_ways(image_embeds, long_captions, embed)[0], 1)
    if len(labels) == len(rows):
        metrics["zero_shot_accuracy"] = agreement(_classify(image_embeds, labels, embed), labels)
    if captions:
        originals = [texts for texts in references if texts]
        metrics["caption_fidelity"] = caption_fidelity(captions, [first for first, *_ in originals])
        if len(captions) > 1 and importlib.util.find_spec("pycocoevalcap"):
            metrics["cider"] = cider(captions, originals)
    if region_captions:
        region_texts = [text for row in rows for text in _region_texts_of(row)]
        region_embeds = torch.cat([answer.region_embeds for answer in answers if answer.region_embeds is not None])
        metrics["region_recall@1"] = recall_at(_region_ranks(region_embeds, region_texts, embed), 1)
        metrics["region_caption_fidelity"] = region_caption_fidelity(region_captions, region_texts)

    if samples is not None:
        samples += [{"caption": answer.caption, "region_captions": answer.region_captions} for answer in answers]
    return {name: value for name, value in metrics.items() if value is not None}


@dataclass
class _Answer:
    """What the model makes of a row, beside the row's columns without the image, which would fill the memory."""

    row: dict[str, Any]
    image_embed: torch.Tensor  # (D,)
    caption: str | None = None
    region_embeds: torch.Tensor | None = None  # (R, D)
    region_captions: list[str] = field(default_factory=list)


def _answers(model, processor, rows: Iterable[Mapping[str, Any]], batch_size: int, max_new_tokens: int):
    answers: list[_Answer] = []
    for batch in _batches(rows, batch_size):
        # Cloned: a row that is a view of its batch would be sent to other processes with all of the batch.
        image_embeds = [embed.clone() for embed in embed_images(model, processor, [row["image"] for row in batch])]
        columns = [{name: value for name, value in row.items() if name != "image"} for row in batch]
        new = [_Answer(*pair) for pair in zip(columns, image_embeds, strict=True)]
        answers += new

        described = [number for number, row in enumerate(batch) if _captions_of(row)]
        if described:
            images = [batch[number]["image"] for number in described]
            captions = generate_captions(model, processor, images, max_new_tokens)
            for number, caption in zip(described, captions, strict=True):
                new[number].caption = caption
        boxed = [number for number, row in enumerate(batch) if _region_texts_of(row)]
        if boxed:
            images, boxes = [batch[number]["image"] for number in boxed], [batch[number]["boxes"] for number in boxed]
            counts = [len(own) for own in boxes]
            embeds = embed_regions(model, processor, images, boxes).split(counts)
            texts = iter(generate_region_captions(model, processor, images, boxes, max_new_tokens))
            for number, own_embeds in zip(boxed, embeds, strict=True):
                new[number].region_embeds = own_embeds.clone()
                new[number].region_captions = list(islice(texts, len(own_embeds)))
    return answers


def _embed_texts(model, processor, batch_size: int, share: Share, texts: list[str]) -> torch.Tensor:
    """(T, D), each process embedding its share of the texts."""
    own = list(share.of(texts))
    embeds = embed_texts(model, processor, own, batch_size) if own else ()
    return torch.stack(share.gather([embed.clone() for embed in embeds]))


def _batches(rows: Iterable[Mapping[str, Any]], batch_size: int) -> Iterator[list[Mapping[str, Any]]]:
    remaining = iter(tqdm(rows, desc="images", unit="image"))
    while batch := list(islice(remaining, batch_size)):
        yield batch


def _captions_of(row: Mapping[str, Any]) -> list[str]:
    captions = row.get("captions") or row.get("text") or []
    return [captions] if isinstance(captions, str) else list(captions)


def _region_texts_of(row: Mapping[str, Any]) -> list[str]:
    texts, boxes = row.get("region_captions") or [], row.get("boxes") or []
    if texts and len(texts) != len(boxes):
        raise ValueError(f"a row of dataset has {len(boxes)} boxes and {len(texts)} region_captions, expected as many")
    return texts


def _ranks_both_ways(
    image_embeds: torch.Tensor, texts_of_image: Sequence[Sequence[str]], embed: Callable[[list[str]], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of every text among the images, and of every image that has texts among the different texts."""
    images_of_text: dict[str, set[int]] = defaultdict(set)
    for image, texts in enumerate(texts_of_image):
        for text in texts:
            images_of_text[text].add(image)
    number = {text: row for row, text in enumerate(images_of_text)}
    text_embeds = embed(list(number))  # (different texts, D)

    text_ranks = retrieval_ranks(text_embeds, image_embeds, list(images_of_text.values()))
    asked = torch.tensor([number[text] for texts in texts_of_image for text in texts])
    described = [image for image, texts in enumerate(texts_of_image) if texts]
    right_texts = [{number[text] for text in texts_of_image[image]} for image in described]
    return text_ranks[asked], retrieval_ranks(image_embeds[described], text_embeds, right_texts)


def _region_ranks(
    region_embeds: torch.Tensor, texts: Sequence[str], embed: Callable[[list[str]], torch.Tensor]
) -> torch.Tensor:
    """Ranks of every region caption among the regions, where `texts[i]` describes region i."""
    meanings = [parse_region_caption(text) or text.lower() for text in texts]
    regions_of_meaning: dict[Hashable, set[int]] = defaultdict(set)
    for region, meaning in enumerate(meanings):
        regions_of_meaning[meaning].add(region)
    return retrieval_ranks(embed(list(texts)), region_embeds, [regions_of_meaning[meaning] for meaning in meanings])


def _classify(
    image_embeds: torch.Tensor, labels: Sequence[str], embed: Callable[[list[str]], torch.Tensor]
) -> list[str]:
    """The class of each image whose prompt is nearest, among all that scenes have, or else among `labels`."""
    classes = list(LABELS) if set(labels) <= set(LABELS) else sorted(set(labels))
    scores = image_embeds @ embed([label_prompt(label) for label in classes]).T  # (I, classes)
    return [classes[best] for best in scores.argmax(dim=1).tolist()]
