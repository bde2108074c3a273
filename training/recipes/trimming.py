"""A smaller language model to start from: the first layers of a pretrained one, and the part of its vocabulary that
texts use."""

import copy
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_TEXTS_AT_ONCE = 1000
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id")


def with_first_layers(config: PreTrainedConfig, num_hidden_layers: int) -> PreTrainedConfig:
    """Return the configuration of a language model of the first layers of another one.

    Raises:
        ValueError: If it has fewer, or none are asked for.
    """
    if not 1 <= num_hidden_layers <= config.num_hidden_layers:
        raise ValueError(
            f"`num_hidden_layers` is {num_hidden_layers}; expected 1 to {config.num_hidden_layers}, those of the "
            f"`{config.model_type}`."
        )
    config = copy.deepcopy(config)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_hidden_layers]
    config.num_hidden_layers = num_hidden_layers
    config.__dict__.pop("quantization_config", None)  # of what was read from GGUF
    return config


def keep_first_layers(language_model: PreTrainedModel, num_hidden_layers: int) -> PreTrainedModel:
    """Return a language model of the first layers of another one, with its embeddings, last norm and head.

    The last norm was trained for other states, of which it makes far too certain logits. So it is scaled, where it
    can be, such that logits of random tokens have a variance of 1: a loss of 28 becomes one of 8.

    Args:
        language_model: A causal language model.
        num_hidden_layers: The number of layers, from 1 to as many as it has.

    Raises:
        ValueError: If the number is out of this range, or a model of fewer layers has other weights than these.
    """
    config = with_first_layers(language_model.config, num_hidden_layers)
    cut = AutoModelForCausalLM.from_config(config, dtype=language_model.dtype)
    weights = language_model.state_dict()
    for name, weight in cut.state_dict().items():
        if name not in weights or weights[name].shape != weight.shape:
            raise ValueError(
                f"`num_hidden_layers` is {num_hidden_layers}, with which a `{config.model_type}` has another `{name}`;"
                " expected a language model whose layers do not depend on how many there are."
            )
    cut.load_state_dict({name: weights[name] for name in cut.state_dict()})
    cut.eval()  # as a model is that was loaded
    cut.generation_config = copy.deepcopy(language_model.generation_config)
    if num_hidden_layers < language_model.config.num_hidden_layers:
        _calm_logits(cut)
    return cut


@torch.no_grad()
def _calm_logits(language_model: PreTrainedModel) -> None:
    """Scale the last norm, if that scales the states after it."""
    decoder, head = language_model.get_decoder(), language_model.get_output_embeddings()
    hidden_size = language_model.config.get_text_config().hidden_size
    norms = [m for m in decoder.modules() if getattr(getattr(m, "weight", None), "shape", None) == (hidden_size,)]
    if not norms or head is None:
        return
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(language_model.config.get_text_config().vocab_size, (1, 64), generator=generator)

    def spread() -> float:
        return (
            float(decoder(input_ids, use_cache=False).last_hidden_state.std() * head.weight.std()) * hidden_size**0.5
        )

    before, weight = spread(), norms[-1].weight
    kept = weight.clone()
    weight /= before
    if not math.isclose(spread(), 1, rel_tol=0.01):  # a norm of another form
        weight.copy_(kept)


def trim_tokenizer(tokenizer, texts: Iterable[str], vocab_size: int) -> tuple[Any, list[int]]:
    """Trim the vocabulary of a BPE tokenizer to the tokens that texts use most.

    Every byte or character that tokens begin as stays, so that what could be encoded still can be, and all that a
    token is merged from stays with it. So a text whose tokens all stay is cut into the same tokens as before, and
    another one into shorter ones. Chat templates are dropped: their tokens may be gone.

    Args:
        tokenizer: A tokenizer of transformers whose model is a BPE.
        texts: The texts; each is counted as it is and in lower case.
        vocab_size: The most tokens, with special tokens.

    Returns:
        The trimmed tokenizer, and for each of its tokens the id that it had, in rising order.

    Raises:
        ValueError: If the tokenizer is no BPE, or `vocab_size` leaves no room for the characters and special tokens.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    content = {} if backend is None else json.loads(backend.to_str())
    if content.get("model", {}).get("type") != "BPE":
        kind = content.get("model", {}).get("type", type(tokenizer).__name__)
        raise ValueError(f"`trim_vocabulary` is given for a tokenizer of type {kind}; expected a BPE.")
    vocabulary: dict[str, int] = content["model"]["vocab"]
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in content["model"]["merges"]
    ]
    parts: dict[str, set[str]] = {}  # of each token, by all ways to merge it
    prefix = content["model"].get("continuing_subword_prefix") or ""
    for left, right in merges:
        parts.setdefault(left + right.removeprefix(prefix), set()).update((left, right))

    kept = {token for token in vocabulary if token not in parts}  # characters and bytes
    kept |= {token["content"] for token in content["added_tokens"]} & vocabulary.keys()
    vocab_size -= sum(token["content"] not in vocabulary for token in content["added_tokens"])
    if len(kept) > vocab_size:
        raise ValueError(
            f"`trim_vocabulary` is {vocab_size}; expected at least {len(kept)}, for single characters and special "
            "tokens."
        )
    for token, _ in _count_tokens(backend, texts).most_common():
        closure = _closure(token, parts, kept)
        if len(kept) + len(closure) <= vocab_size:
            kept |= closure
    old_ids = sorted(vocabulary[token] for token in kept)
    old_ids += [token["id"] for token in content["added_tokens"] if token["content"] not in vocabulary]
    new_ids = {old: new for new, old in enumerate(old_ids)}
    content["model"]["vocab"] = {token: new_ids[old] for token, old in vocabulary.items() if token in kept}
    content["model"]["merges"] = [
        list(merge) for merge in merges if {*merge, merge[0] + merge[1].removeprefix(prefix)} <= kept
    ]
    _renumber(content, new_ids)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = Tokenizer.from_str(json.dumps(content))
    trimmed.chat_template = None
    return trimmed, old_ids


def trim_vocabulary(language_model: PreTrainedModel, old_ids: list[int]) -> None:
    """Keep, in place, only some rows of the embeddings and the head of a language model.

    Args:
        language_model: A causal language model.
        old_ids: Of `trim_tokenizer`.

    Raises:
        ValueError: If its embeddings or its head are no tables of the vocabulary.
    """
    new_ids = {old: new for new, old in enumerate(old_ids)}
    config, rows = language_model.config.get_text_config(), torch.tensor(old_ids)
    embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    if type(embeddings) is not nn.Embedding or type(head) is not nn.Linear:
        raise ValueError(
            f"`trim_vocabulary` is given for a `{config.model_type}` with {type(embeddings).__name__} and "
            f"{type(head).__name__}; expected an Embedding and a Linear."
        )
    if max(old_ids) >= len(embeddings.weight):  # tokens that only the tokenizer knew
        language_model.resize_token_embeddings(max(old_ids) + 1, mean_resizing=False)
        embeddings, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    is_tied = head.weight is embeddings.weight
    embeddings.weight = nn.Parameter(embeddings.weight.detach()[rows].clone())
    embeddings.num_embeddings, head.out_features = len(rows), len(rows)
    embeddings.padding_idx = new_ids.get(embeddings.padding_idx)
    head.weight = embeddings.weight if is_tied else nn.Parameter(head.weight.detach()[rows].clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach()[rows].clone())
    config.vocab_size = len(rows)
    for settings in (config, language_model.generation_config):
        for name in _TOKEN_IDS:
            value = getattr(settings, name, None)
            if isinstance(value, list):
                setattr(settings, name, [new_ids[one] for one in value if one in new_ids] or None)
            elif value is not None:
                setattr(settings, name, new_ids.get(value))


def _count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter:
    counts: Counter = Counter()
    texts = iter(texts)
    while some := list(islice(texts, _TEXTS_AT_ONCE)):
        both = list(dict.fromkeys([*some, *(text.lower() for text in some)]))
        for encoding in tokenizer.encode_batch(both, add_special_tokens=False):
            counts.update(encoding.tokens)
    return counts


def _closure(token: str, parts: Mapping[str, set[str]], kept: set[str]) -> set[str]:
    """A token, and all that it is merged from, without what is kept already."""
    found, asked = set(), [token]
    while asked:
        one = asked.pop()
        if one not in found and one not in kept:
            found.add(one)
            asked += parts.get(one, ())
    return found


def _renumber(content: dict, new_ids: Mapping[int, int]) -> None:
    """Give added tokens, and those that a post-processor adds, their new ids."""
    for token in content["added_tokens"]:
        token["id"] = new_ids[token["id"]]

    def walk(value: Any) -> None:
        if isinstance(value, list):
            for inner in value:
                walk(inner)
        elif isinstance(value, dict):
            for name, inner in value.items():
                if name == "ids":
                    value[name] = [new_ids[one] for one in inner]
                elif name in ("cls", "sep"):  # [token, id]
                    value[name] = [inner[0], new_ids[inner[1]]]
                else:
                    walk(inner)

    walk(content.get("post_processor"))
