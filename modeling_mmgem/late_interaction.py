"""Scores of embeddings: the dot product of single vectors, MaxSim of several."""

import torch


def maxsim(query_embeds: torch.Tensor, document_embeds: torch.Tensor) -> torch.Tensor:
    """Mean over the vectors of a query of their largest dot product with a vector of the document (ColBERT,
    https://arxiv.org/abs/2004.12832, which has the sum). One after the other, so that memory holds k times less than
    all products.

    Args:
        query_embeds: (Q, k, D) unit vectors.
        document_embeds: (P, m, D) unit vectors.

    Returns:
        (Q, P), from -1 to 1.
    """
    scores = 0.0
    for vectors in query_embeds.unbind(1):
        products = vectors @ document_embeds.flatten(0, 1).T  # (Q, P * m)
        scores = scores + products.unflatten(1, document_embeds.shape[:2]).amax(-1)  # (Q, P)
    return scores / query_embeds.shape[1]


def similarity(query_embeds: torch.Tensor, document_embeds: torch.Tensor) -> torch.Tensor:
    """Score every query against every document, by the cosine or by `maxsim`.

    Args:
        query_embeds: (Q, D) or (Q, k, D) unit vectors.
        document_embeds: (P, D) or (P, m, D), likewise.

    Returns:
        (Q, P), from -1 to 1.

    Raises:
        TypeError: If one side is no tensor, or of another type than the other.
        ValueError: If one side has single vectors and the other several, there are none, or widths differ.
    """
    sides = {"query_embeds": query_embeds, "document_embeds": document_embeds}
    for name, embeds in sides.items():
        if not isinstance(embeds, torch.Tensor):
            raise TypeError(f"`{name}` is a {type(embeds).__name__}; expected a tensor.")
    if query_embeds.dtype != document_embeds.dtype:
        raise TypeError(
            f"`query_embeds` is {query_embeds.dtype} and `document_embeds` {document_embeds.dtype}; expected one type."
        )
    if query_embeds.ndim != document_embeds.ndim or query_embeds.ndim not in (2, 3):
        raise ValueError(
            f"`query_embeds` has shape {tuple(query_embeds.shape)} and `document_embeds` "
            f"{tuple(document_embeds.shape)}; expected (Q, D) and (P, D), or (Q, k, D) and (P, m, D)."
        )
    if 0 in (*query_embeds.shape[1:], *document_embeds.shape[1:]):
        raise ValueError(
            f"`query_embeds` has shape {tuple(query_embeds.shape)} and `document_embeds` "
            f"{tuple(document_embeds.shape)}; expected vectors with at least one number."
        )
    if query_embeds.shape[-1] != document_embeds.shape[-1]:
        raise ValueError(
            f"`query_embeds` has {query_embeds.shape[-1]} dimensions, but `document_embeds` has "
            f"{document_embeds.shape[-1]}; expected the same number."
        )
    return query_embeds @ document_embeds.T if query_embeds.ndim == 2 else maxsim(query_embeds, document_embeds)
