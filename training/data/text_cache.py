"""States of a frozen language model after texts, computed once and kept on the disk."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch

from mmgem.processing.token_batches import batches_of_tokens, tokens_at_a_time
from mmgem.training.data.drawn_texts import DrawnText
from mmgem.training.data.feature_cache import FeatureCache, weights_digest
from mmgem.training.data.skipped import readable_texts
from mmgem.training.data.sources import Source
from mmgem.training.inference import inference, padded, to_model
from mmgem.training.progress import progress

_TEXTS_OF_A_FILE = 4096  # what a killed run loses
# The parts that train with states of texts in place of the language model; all others have no part in the loss.
_TRAINED = ("pool_aggregator", "image_projection", "text_projection", "image_vectors", "logit_scale", "logit_bias")


class CachedTexts:
    """The states of [EMB] vectors after texts, by the tokens of the texts.

    Args:
        cache: The states, (k, H) each.
        shape: (k, H).
    """

    def __init__(self, cache: FeatureCache, shape: tuple[int, int]):
        self.cache = cache
        self.shape = shape

    def look_up(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the states of the T texts of a batch, (T, k, H); zeros for texts that are not compared.

        Args:
            batch: `input_ids`, `attention_mask` and `contrastive_mask`, as `MMGEMCollator` makes them.

        Raises:
            ValueError: If the cache lacks one.
        """
        states = torch.zeros(len(batch["input_ids"]), *self.shape)
        compared = batch["contrastive_mask"].nonzero()[:, 0].tolist()
        keys = text_keys(batch)
        if missing := [row for row in compared if keys[row] not in self.cache]:
            raise ValueError(
                f"feature cache {str(self.cache.folder)!r} has no states of {len(missing)} of {len(compared)} texts; "
                "expected those of all, as `fill_texts` computes them."
            )
        for row in compared:
            states[row] = self.cache[keys[row]]
        return states


def text_maker(model) -> dict[str, str]:
    """Say what states are of: a hash of the language model and the [EMB] vectors, and how they read.

    Args:
        model: An `MMGEMModel`.
    """
    weights = model.language_model.state_dict() | {"embedding_tokens": model.embedding_tokens}
    return {"weights": weights_digest(weights), "text_attention": model.config.text_attention}


def text_keys(batch: Mapping[str, torch.Tensor]) -> list[str]:
    """The keys of the texts of a batch, which only texts of the same tokens have."""
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [hashlib.blake2b(ids.long().numpy().tobytes(), digest_size=16).hexdigest() for ids in rows]


def check_frozen_texts(model) -> None:
    """Refuse a model that would train parts which cached states of texts leave out.

    Args:
        model: An `MMGEMModel`, set for its training.

    Raises:
        ValueError: If another part than the aggregator, the projections of embeddings and the temperature trains.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.partition(".")[0] not in _TRAINED:
            raise ValueError(
                f"`texts` of `cache_features` is True, but `{name}` trains; expected `train_only` of "
                "[pool_aggregator, image_projection, text_projection, logit_scale] or some of them."
            )


def fill_texts(
    cache: FeatureCache, model, collator, sources: Sequence[Source], part: int = 0, parts: int = 1
) -> CachedTexts:
    """Compute the states that a cache lacks, of all texts that a collator may draw.

    Args:
        cache: The cache, filled in place.
        model: An `MMGEMModel` on its device, whose language model is frozen.
        collator: The `MMGEMCollator`.
        sources: With a length.
        part, parts: Which of the processes that share the work this is.

    Returns:
        The states of the texts.

    Raises:
        ValueError: If a source is a stream, whose rows nobody can count.
    """
    texts = dict.fromkeys(text for source in sources for text in _texts_of(source, collator))
    missing: dict[str, torch.Tensor] = {}
    for batch in _batches(list(texts), 1024):
        rows = collator.tokenize([DrawnText(text, is_generated=False) for text in batch])
        ids = [own[mask.bool()] for own, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)]
        missing |= {key: own for key, own in zip(text_keys(rows), ids, strict=True) if key not in cache}
    own_keys, batch_tokens = sorted(missing)[part::parts], tokens_at_a_time(model.device)
    with progress(total=len(own_keys), desc="texts whose states are kept", unit="text") as done:
        for file in _batches(own_keys, _TEXTS_OF_A_FILE):
            states: dict[str, torch.Tensor] = {}
            for batch in batches_of_tokens([len(missing[key]) for key in file], batch_tokens):
                keys = [file[row] for row in batch]
                inputs = to_model(model, padded([missing[key] for key in keys]))
                with inference(model):
                    features = model.get_text_features(**inputs)
                states |= dict(zip(keys, features.last_hidden_state.float().cpu(), strict=True))  # (k, H) each
            cache.add(states)
            done.update(len(file))
    return CachedTexts(cache, tuple(model.embedding_tokens.shape))


def _texts_of(source: Source, collator) -> Iterator[str]:
    if not isinstance(source, Sized):
        raise ValueError(f"`cache_features` is given, but {source.name} is a stream; expected none.")
    for row in readable_texts(source):
        yield from collator.embeddable_texts(row)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
