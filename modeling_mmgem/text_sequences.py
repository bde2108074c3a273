"""The texts of a joint step as sequences of tokens, laid end to end without padding."""

from dataclasses import dataclass

import torch

from .text_rows import IGNORED_LABEL, TextRows, first_token_id, is_first_token


@dataclass
class TextSequences:
    """S sequences, N tokens in all. Where vectors take the place of tokens, the token ids mean nothing.

    Args:
        token_ids: (N,) long.
        labels: (N,) long, which token is to be predicted there, -100 for none.
        unit: (N,) long, numbers the images, boxes or memories whose vectors stand there, in their order; -1 elsewhere.
        is_suffix: (N,) bool, the tokens after a text whose place vectors take.
        is_prompt: (N,) bool, tokens that stand before all that is written or read out.
        lengths: (S,) long.
    """

    token_ids: torch.Tensor
    labels: torch.Tensor
    unit: torch.Tensor
    is_suffix: torch.Tensor
    is_prompt: torch.Tensor
    lengths: torch.Tensor

    @property
    def is_prefix(self) -> torch.Tensor:
        """(N,) bool, where there are vectors of images, boxes or memories."""
        return self.unit >= 0

    @property
    def sequence(self) -> torch.Tensor:
        """(N,) long, which sequence a token belongs to."""
        return torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(self.lengths)


@torch.compiler.disable
def caption_sequences(rows: TextRows, image_length: int, box_length: int, config) -> TextSequences:
    """[BOS] visual tokens of the image or box, text, [EOS]: what the model learns to write from images or nothing.

    Args:
        rows: All texts.
        image_length, box_length: Visual tokens of an image, and of a box.
        config: Of the model.
    """
    chosen = rows.is_generated & ~rows.is_recalled  # (T,)
    length = torch.where(rows.box_index[chosen] >= 0, box_length, image_length)  # (S,)
    return _written_sequences(rows, chosen, rows.image_index[chosen] >= 0, length, config)


@torch.compiler.disable
def recalled_sequences(rows: TextRows, num_embedding_tokens: int, config) -> TextSequences:
    """[BOS] memory, text, [EOS]: what the model learns to write from the [EMB] states of other texts."""
    chosen = rows.is_recalled  # (T,)
    length = torch.full_like(rows.memory_row[chosen], num_embedding_tokens)  # (S,)
    return _written_sequences(rows, chosen, chosen[chosen], length, config)


def count_labels(rows: TextRows, config) -> int:
    """How many tokens of all the texts are labels of the caption loss, end tokens included."""
    sequences = caption_sequences(rows, 1, 1, config), recalled_sequences(rows, 1, config)
    return sum(int((part.labels != IGNORED_LABEL).sum()) for part in sequences)


def _written_sequences(
    rows: TextRows, chosen: torch.Tensor, has_unit: torch.Tensor, unit_length: torch.Tensor, config
) -> TextSequences:
    """[BOS] vectors, text, [EOS].

    Args:
        rows: All texts.
        chosen: (T,) bool, S of them.
        has_unit: (S,) bool, which stand after an image, a box or a memory.
        unit_length: (S,) long, vectors of it.
        config: Of the model, whose `text_config` knows [BOS] and [EOS].
    """
    input_ids, attention_mask, labels = _without_empty_columns(
        rows.attention_mask[chosen], rows.input_ids[chosen], rows.attention_mask[chosen], rows.labels[chosen]
    )  # (S, L)
    is_token = attention_mask.bool()
    is_last = is_token & (is_token.cumsum(-1) == is_token.sum(-1, keepdim=True))  # (S, L)
    end_ids = config.text_config.eos_token_id
    eos_token_id = first_token_id(end_ids)
    end_ids = list(end_ids) if isinstance(end_ids, list | tuple) else [eos_token_id]
    is_end = torch.isin(input_ids, input_ids.new_tensor(end_ids))  # (S, L)
    # By size, not by `any`, which would not reduce rows that are not there.
    ends = (is_last & is_end).sum(-1, keepdim=True) > 0  # (S, 1)
    is_finished = (is_last & (labels != IGNORED_LABEL)).sum(-1, keepdim=True) > 0  # (S, 1)
    eos_labels = torch.where(is_finished, eos_token_id, IGNORED_LABEL)  # (S, 1)
    # The first token of all has nothing to be predicted from.
    is_first = is_token & (is_token.cumsum(-1) == 1)
    labels = labels.masked_fill(is_first & ~has_unit[:, None], IGNORED_LABEL)
    suffix = ~ends & (eos_token_id >= 0)  # (S, 1)
    return lay_out(input_ids, attention_mask, labels, has_unit[:, None], unit_length, suffix, eos_labels, config)


@torch.compiler.disable
def embedded_sequences(rows: TextRows, num_visual_tokens: int, num_embedding_tokens: int, config) -> TextSequences:
    """[BOS] visual tokens of fused images, text, [EMB]: what is embedded; the [EMB] vectors are the suffix."""
    chosen = rows.is_embedded  # (T,)
    input_ids, attention_mask = _without_empty_columns(
        rows.attention_mask[chosen], rows.input_ids[chosen], rows.attention_mask[chosen]
    )  # (S, L)
    is_fused = rows.fused_index[chosen] >= 0  # (S, F)
    suffix = is_fused.new_ones(len(input_ids), num_embedding_tokens)  # (S, k)
    no_label, no_labels = torch.full_like(input_ids, IGNORED_LABEL), suffix.long().fill_(IGNORED_LABEL)
    length = torch.full((len(input_ids),), num_visual_tokens, device=input_ids.device)  # (S,)
    return lay_out(input_ids, attention_mask, no_label, is_fused, length, suffix, no_labels, config)


def lay_out(input_ids, attention_mask, labels, has_unit, unit_length, suffix, suffix_labels, config) -> TextSequences:
    """Sequences of texts, and of the images, boxes or memories that go with them.

    These stand where a text has its image placeholders, one for each, or else right after its [BOS].

    Args:
        input_ids, attention_mask, labels: (S, L).
        has_unit: (S, F) bool, the units that there are.
        unit_length: (S,) long, vectors of each unit of a text.
        suffix, suffix_labels: (S, m), what there is after a text.
        config: Of the model.

    Raises:
        ValueError: If a text has placeholders, but not one for each of its units.
    """
    text_config, is_token = config.text_config, attention_mask.bool()
    bos_token_id, eos_token_id = (
        max(first_token_id(token_id), 0) for token_id in (text_config.bos_token_id, text_config.eos_token_id)
    )
    is_place = is_token & (input_ids == config.image_token_id)  # (S, L)
    num_places, num_units = is_place.sum(-1, keepdim=True), has_unit.sum(-1, keepdim=True)  # (S, 1)
    has_places = num_places > 0
    if (has_places & (num_places != num_units)).any():
        raise ValueError(
            f"`input_ids` holds {num_places.flatten().tolist()} image placeholders in texts that go with "
            f"{num_units.flatten().tolist()} images, boxes or memories; expected one for each, or none."
        )
    is_bos = is_first_token(input_ids, attention_mask, text_config.bos_token_id) & ~has_places  # (S, L)
    has_bos = is_bos.sum(-1, keepdim=True) > 0  # (S, 1)
    length = unit_length[:, None]  # (S, 1)
    # How many tokens each column becomes: [BOS], units without a placeholder, the text, the suffix.
    columns = has_bos, has_unit & ~has_places, is_token & ~is_bos, suffix  # (S, 1), (S, F), (S, L), (S, m)
    counts = [columns[0].long(), columns[1] * length, torch.where(is_place, length, columns[2].long()), suffix.long()]
    count = torch.cat(counts, dim=1)  # (S, 1 + F + L + m)

    def flat(bos, unit, text, after) -> torch.Tensor:
        values = [
            value if isinstance(value, torch.Tensor) else torch.full_like(part, value, dtype=torch.long)
            for value, part in zip((bos, unit, text, after), columns, strict=True)
        ]
        return torch.cat(values, dim=1).flatten().repeat_interleave(count.flatten())

    is_unit = torch.cat([torch.zeros_like(has_bos), columns[1], is_place, torch.zeros_like(suffix)], dim=1)
    unit = (is_unit.flatten().cumsum(0) - 1).view_as(is_unit).masked_fill(~is_unit, -1)
    is_labelled = labels != IGNORED_LABEL
    return TextSequences(
        token_ids=flat(bos_token_id, 0, input_ids, eos_token_id),
        labels=flat(IGNORED_LABEL, IGNORED_LABEL, labels.masked_fill(is_place, IGNORED_LABEL), suffix_labels),
        unit=unit.flatten().repeat_interleave(count.flatten()),
        is_suffix=flat(0, 0, 0, 1).bool(),
        is_prompt=flat(1, 1, (is_labelled.cumsum(-1) == 0).long(), 0).bool(),
        lengths=count.sum(-1),
    )


def _without_empty_columns(attention_mask: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Drops the columns of (S, L) tensors in which no row has a token: longer rows may have been left out."""
    used = attention_mask.bool().any(0)  # (L,)
    return [tensor[:, used] for tensor in tensors]
