"""The share of each patch of an image in its similarity with a query."""

import torch
import torch.nn.functional as F

from .pool_aggregator import linear_of_rows


def similarity_map(
    model,
    grid: torch.Tensor,
    query_embeds: torch.Tensor,
    spatial_shapes: torch.Tensor | None = None,
    num_vectors: int | None = None,
) -> torch.Tensor:
    """See `MMGEMModel.similarity_map`.

    Args:
        model: An `MMGEMModel`.
        grid: (I, C, rows, columns) patch features, as its vision tower gives them.
        query_embeds: (T, D) or (T, k, D), of any length, or the first dimensions of such.
        spatial_shapes: (I, 2) rows and columns of each image, if what is beyond them is padding.
        num_vectors: How many of the vectors of an image are compared, the first ones; by default all.

    Returns:
        (I, T, rows, columns).

    Raises:
        ValueError: As `MMGEMModel.similarity_map`.
    """
    config = model.config
    if config.embedding_prompt_ids is not None:
        raise ValueError(
            "`embedding_prompt_ids` of the model is given, so that its language model reads images before they are "
            "compared; expected a model without them, whose image embeddings are sums over patches."
        )
    vectors, width = config.num_embedding_tokens if config.is_multi_vector else 1, model.embedding_dim
    num_vectors = vectors if num_vectors is None else num_vectors
    if not 1 <= num_vectors <= vectors:
        raise ValueError(f"`num_vectors` is {num_vectors}; expected 1 to {vectors}.")
    shape = tuple(query_embeds.shape)
    if len(shape) != 2 + config.is_multi_vector or not 1 <= shape[-1] <= width or 0 in shape:
        expected = f"(T, k, {width})" if config.is_multi_vector else f"(T, {width})"
        raise ValueError(f"`query_embeds` has shape {shape}; expected {expected}, or fewer dimensions of such.")
    queries = F.normalize(query_embeds.float(), dim=-1).view(shape[0], -1, shape[-1])  # (T, k, d)

    def map_of(grid: torch.Tensor) -> torch.Tensor:
        """(I, C, rows, columns) -> (I, T, rows, columns)"""
        embeds = _unit_sum(_patch_embeds(model, grid)[:, :num_vectors, :, : shape[-1]])  # (I, m, P, d)
        return _shares(embeds, queries).unflatten(2, tuple(grid.shape[2:]))

    if spatial_shapes is None:
        return map_of(grid)
    maps = queries.new_zeros(len(grid), len(queries), *grid.shape[2:])  # (I, T, rows, columns)
    for image, (rows, columns) in enumerate(spatial_shapes.tolist()):
        maps[image, :, :rows, :columns] = map_of(grid[image : image + 1, :, :rows, :columns])[0]
    return maps


def _patch_embeds(model, grid: torch.Tensor) -> torch.Tensor:
    """(I, C, rows, columns) -> (I, m, P, D), float32, whose sum over the P patches is the unit embedding of an image,
    of each of its m vectors"""
    num_patches = grid.shape[2] * grid.shape[3]
    parts, patches, bias = model.pool_aggregator.contributions(grid)  # (I, n, W, C), (n, W), (C,)
    tokens = parts.sum(dim=2) + bias  # (I, n, C)
    if model.image_vectors is None:
        weights = torch.full_like(tokens[..., :1], 1 / tokens.shape[1]).transpose(1, 2)  # (I, 1, n)
    else:
        weights = model.image_vectors.weights(tokens)  # (I, m, n)
    weighted = (weights[..., None, None] * parts[:, None]).flatten(2, 3)  # (I, m, n * W, C)
    by_patch = weighted.new_zeros(*weighted.shape[:2], num_patches, weighted.shape[-1])  # (I, m, P, C)
    by_patch = by_patch.index_add(2, patches.flatten(), weighted)  # a patch may be in several windows
    by_patch = by_patch + bias / num_patches
    # The norm takes from a sum its mean and divides by its deviation; the mean of a sum is that of its parts.
    norm, linear = model.image_projection
    deviation = (by_patch.sum(dim=2).float().var(dim=-1, unbiased=False) + norm.eps).sqrt()  # (I, m)
    centred = (by_patch - by_patch.mean(dim=-1, keepdim=True)) / deviation[..., None, None].to(by_patch.dtype)
    bias = linear(norm.bias[None]) / num_patches  # (1, D)
    embeds = linear_of_rows(linear, centred * norm.weight) + bias  # (I, m, P, D)
    embeds = _unit_sum(embeds.float())
    if model.calibrator is None:
        return embeds
    mean = model.calibrator.mean("image").float().view(-1, 1, embeds.shape[-1])  # (1 or m, 1, D)
    return _unit_sum(embeds - mean / num_patches)


def _unit_sum(parts: torch.Tensor) -> torch.Tensor:
    """(I, m, P, D) -> the same, divided by the length of the sum over P"""
    return parts / parts.sum(dim=2, keepdim=True).norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _shares(patch_embeds: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """(I, m, P, D), (T, k, D) -> (I, T, P): each vector of a query is compared with the nearest one of the image"""
    shares = 0.0
    for vectors in queries.unbind(1):  # (T, D)
        products = torch.einsum("impd,td->itmp", patch_embeds, vectors)  # (I, T, m, P)
        nearest = products.sum(dim=-1).argmax(dim=2)  # (I, T)
        shares = shares + products.take_along_dim(nearest[..., None, None], dim=2).squeeze(2)  # (I, T, P)
    return shares / queries.shape[1]
