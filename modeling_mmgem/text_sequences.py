"""The texts of a joint step as sequences of tokens, laid end to end without padding."""

from dataclasses import dataclass

import torch

from .text_rows import IGNORED_LABEL, TextRows, first_token_id, is_first_token


@dataclass
class TextSequences:
    """S sequences, N tokens in all. Of a prefix or suffix the token ids mean nothing: vectors take their place.

    Args:
        token_ids: (N,) long.
        labels: (N,) long, which token is to be predicted there, -100 for none.
        is_prefix, is_suffix: (N,) bool, tokens of the prefix, which stands before a text, but after its [BOS], and of
            the suffix.
        lengths: (S,) long.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    is_prefix: torch.Tensor
    is_suffix: torch.Tensor
    lengths: torch.Tensor


def caption_sequences(rows: TextRows, num_visual_tokens: int, text_config) -> TextSequences:
    """[BOS] visual tokens of the image or box, text, [EOS]: what the model learns to write from images or nothing."""
    chosen = rows.is_generated & ~rows.is_recalled  # (T,)
    return _written_sequences(rows, chosen, rows.image_index[chosen] >= 0, num_visual_tokens, text_config)


def recalled_sequences(rows: TextRows, num_embedding_tokens: int, text_config) -> TextSequences:
    """[BOS] memory, text, [EOS]: what the model learns to write from the [EMB] states of other texts."""
    chosen = rows.is_recalled  # (T,)
    return _written_sequences(rows, chosen, chosen[chosen], num_embedding_tokens, text_config)


def count_labels(rows: TextRows, text_config) -> int:
    """How many tokens of all the texts are labels of the caption loss, end tokens included."""
    sequences = caption_sequences(rows, 1, text_config), recalled_sequences(rows, 1, text_config)
    return sum(int((part.labels != IGNORED_LABEL).sum()) for part in sequences)


def _written_sequences(
    rows: TextRows, chosen: torch.Tensor, has_prefix: torch.Tensor, prefix_length: int, text_config
) -> TextSequences:
    """[BOS] prefix, text, [EOS].

    Args:
        rows: All texts.
        chosen: (T,) bool, S of them.
        has_prefix: (S,) bool.
        prefix_length: Of those that have one: visual tokens, or those of a memory.
        text_config: Of the language model, which knows [BOS] and [EOS].
    """
    input_ids, attention_mask, labels = _without_empty_columns(
        rows.attention_mask[chosen], rows.input_ids[chosen], rows.attention_mask[chosen], rows.labels[chosen]
    )  # (S, L)
    is_token = attention_mask.bool()
    is_last = is_token & (is_token.cumsum(-1) == is_token.sum(-1, keepdim=True))  # (S, L)
    eos_token_id = first_token_id(text_config.eos_token_id)
    # By size, not by `any`, which would not reduce rows that are not there.
    ends = (is_last & (input_ids == eos_token_id)).sum(-1, keepdim=True) > 0  # (S, 1)
    is_finished = (is_last & (labels != IGNORED_LABEL)).sum(-1, keepdim=True) > 0  # (S, 1)
    eos_labels = torch.where(is_finished, eos_token_id, IGNORED_LABEL)  # (S, 1)
    # The first token of all has nothing to be predicted from.
    is_first = is_token & (is_token.cumsum(-1) == 1)
    labels = labels.masked_fill(is_first & ~has_prefix[:, None], IGNORED_LABEL)
    prefix = has_prefix[:, None].expand(-1, prefix_length)  # (S, p)
    return lay_out(input_ids, attention_mask, labels, prefix, ~ends & (eos_token_id >= 0), eos_labels, text_config)


def embedded_sequences(
    rows: TextRows, num_visual_tokens: int, num_embedding_tokens: int, text_config
) -> TextSequences:
    """[BOS] visual tokens of fused images, text, [EMB]: what is embedded; the [EMB] vectors are the suffix."""
    chosen = rows.is_embedded  # (T,)
    input_ids, attention_mask = _without_empty_columns(
        rows.attention_mask[chosen], rows.input_ids[chosen], rows.attention_mask[chosen]
    )  # (S, L)
    is_fused = rows.fused_index[chosen] >= 0  # (S, F)
    prefix = is_fused.repeat_interleave(num_visual_tokens, dim=1)  # (S, F * n)
    suffix = is_fused.new_ones(len(input_ids), num_embedding_tokens)  # (S, k)
    no_label, no_labels = torch.full_like(input_ids, IGNORED_LABEL), suffix.long().fill_(IGNORED_LABEL)
    return lay_out(input_ids, attention_mask, no_label, prefix, suffix, no_labels, text_config)


def lay_out(input_ids, attention_mask, labels, prefix, suffix, suffix_labels, text_config) -> TextSequences:
    """Texts (S, L), the places of prefix (S, p) and suffix (S, m) that there are, and labels (S, L) and (S, m)."""
    bos_token_id, eos_token_id = (
        max(first_token_id(token_id), 0) for token_id in (text_config.bos_token_id, text_config.eos_token_id)
    )
    is_bos = is_first_token(input_ids, attention_mask, text_config.bos_token_id)  # (S, L)
    has_bos = is_bos.sum(-1, keepdim=True) > 0  # (S, 1)
    parts = has_bos, prefix, attention_mask.bool() & ~is_bos, suffix
    keep = torch.cat(parts, dim=1)  # (S, 1 + p + L + m)

    def flat(bos, prefix_value, text, suffix_value) -> torch.Tensor:
        values = bos, prefix_value, text, suffix_value
        columns = [
            value if isinstance(value, torch.Tensor) else torch.full_like(part, value, dtype=torch.long)
            for value, part in zip(values, parts, strict=True)
        ]
        return torch.cat(columns, dim=1)[keep]

    return TextSequences(
        token_ids=flat(bos_token_id, 0, input_ids, eos_token_id),
        labels=flat(IGNORED_LABEL, IGNORED_LABEL, labels, suffix_labels),  # [BOS] is never one
        is_prefix=flat(0, 1, 0, 0).bool(),
        is_suffix=flat(0, 0, 0, 1).bool(),
        lengths=keep.sum(-1),
    )


def _without_empty_columns(attention_mask: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Drops the columns of (S, L) tensors in which no row has a token: longer rows may have been left out."""
    used = attention_mask.bool().any(0)  # (L,)
    return [tensor[:, used] for tensor in tensors]
