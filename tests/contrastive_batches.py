"""Small batches for the contrastive loss."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from mmgem.contrastive_batch import IMAGE, REGION, ContrastiveBatch, ids_of_regions

# Images 0 to 3, of which 1 and 2 are copies, and regions 4 to 8: two of image 0, two of image 1, one of image 3.
IMAGE_IDS = torch.tensor([3, 4, 4, 9])
# Image 0 has two captions; those of image 0 and image 3 share a text; so do a caption and a region's text, and the
# last hard negative says what is true of image 3.
TARGET_INDEX = [0, 0, 1, 2, 3, -1, 4, 5, 5, 7, 8, -1]
QUERY_IDS = [1, 2, 3, 4, 1, 5, 6, 2, 7, 8, 9, 1]
QUERY_MODALITY = [IMAGE] * 6 + [REGION] * 5 + [IMAGE]


def unit_rows(rows: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def image_batch(images, texts, scale=1.0, bias=None, target_index=None, image_ids=None, text_ids=None):
    """(I, D) images and (T, D) texts, one caption each unless said otherwise."""
    return ContrastiveBatch(
        query_embeds=texts,
        target_embeds=images,
        target_index=torch.arange(len(texts)) if target_index is None else torch.tensor(target_index),
        query_ids=torch.arange(len(texts)) if text_ids is None else torch.tensor(text_ids),
        target_ids=torch.arange(len(images)) if image_ids is None else torch.tensor(image_ids),
        query_modality=torch.full((len(texts),), IMAGE),
        target_modality=torch.full((len(images),), IMAGE),
        logit_scale=torch.tensor(scale),
        logit_bias=None if bias is None else torch.tensor(bias),
    )


def mixed_batch(seed: int = 0, dim: int = 8) -> ContrastiveBatch:
    """Everything at once, in float64 and with gradients: copies, equal texts, regions, hard negatives."""
    number_of_images, number_of_targets = len(IMAGE_IDS), 9
    return ContrastiveBatch(
        query_embeds=unit_rows(len(TARGET_INDEX), dim, seed).double().requires_grad_(),
        target_embeds=unit_rows(number_of_targets, dim, seed + 1).double().requires_grad_(),
        target_index=torch.tensor(TARGET_INDEX),
        query_ids=torch.tensor(QUERY_IDS),
        target_ids=torch.cat([IMAGE_IDS, ids_of_regions(IMAGE_IDS, 2).flatten()[[0, 1, 2, 3, 6]]]),
        query_modality=torch.tensor(QUERY_MODALITY),
        target_modality=torch.tensor([IMAGE] * number_of_images + [REGION] * (number_of_targets - number_of_images)),
        logit_scale=torch.tensor(3.0 + seed, dtype=torch.float64, requires_grad=True),
        logit_bias=torch.tensor(-1.5, dtype=torch.float64, requires_grad=True),
    )


def part_of(batch: ContrastiveBatch, queries: list[int], targets: list[int]) -> ContrastiveBatch:
    """Some of the texts, and the targets that they were written for, with others or not."""
    row = {target: row for row, target in enumerate(targets)} | {-1: -1}
    return replace(
        batch,
        **{name: batch[name][queries] for name in ("query_embeds", "query_ids", "query_modality")},
        **{name: batch[name][targets] for name in ("target_embeds", "target_ids", "target_modality")},
        target_index=torch.tensor([row[int(batch.target_index[query])] for query in queries], dtype=torch.long),
    )
