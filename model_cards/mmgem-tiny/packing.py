"""Packing: sequences of many lengths laid end to end in rows, so that no padding is computed."""

import torch


class PackedLayout:
    """Where each token of a list of sequences stands in packed rows (first-fit decreasing bin packing; a row is as
    long as the longest sequence). Positions restart at 0 with each sequence, which is how transformers recognises
    packed rows and keeps their attention block-diagonal. Both sides are rounded up to a multiple of 8, the number of
    rows, where they are few, by at most an eighth: shapes recur from batch to batch, and with them the kernels that
    were compiled for them.

    Args:
        lengths: Tokens of each sequence, each at least 1.
        device: Of the index tensors.
        one_per_row: Give each sequence a row of its own, padded on the right to the longest and rounded up to nothing,
            for language models that cannot keep the sequences of a row apart.

    Attributes:
        row, column: (N,) long, place of each of the N tokens, sequence after sequence.
        shape: (rows, row_length).
        position_ids: (rows, row_length) long; 0 in the unused tail of a row.
        segment_ids: (rows, row_length) long, the sequence a token belongs to; -1 in the unused tail.
    """

    @torch.compiler.disable
    def __init__(self, lengths: list[int], device: torch.device, one_per_row: bool = False):
        row_length = max(lengths) if one_per_row else _round_up(max(lengths))
        sequence_row, sequence_start = [0] * len(lengths), [0] * len(lengths)
        filled: list[int] = []
        for sequence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            length = lengths[sequence]
            candidates = () if one_per_row else enumerate(filled)
            row = next((r for r, used in candidates if used + length <= row_length), len(filled))
            if row == len(filled):
                filled.append(0)
            sequence_row[sequence], sequence_start[sequence] = row, filled[row]
            filled[row] += length

        multiple = 1 if one_per_row else min(8, max(1, 2 ** (len(filled).bit_length() - 4)))
        self.shape = (_round_up(len(filled), multiple), row_length)
        length = torch.tensor(lengths, device=device)
        segment = torch.repeat_interleave(length)  # (N,)
        first_token = length.cumsum(0) - length  # (S,)
        position = torch.arange(len(segment), device=device) - first_token[segment]  # (N,)
        self.row = torch.tensor(sequence_row, device=device)[segment]  # (N,)
        self.column = torch.tensor(sequence_start, device=device)[segment] + position  # (N,)
        self.position_ids = self.pack(position)  # (rows, row_length)
        self.segment_ids = self.pack(segment + 1) - 1  # (rows, row_length)

    @torch.compiler.disable
    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, ...) per-token values -> (rows, row_length, ...), zero in the unused tail of a row."""
        packed = tokens.new_zeros(*self.shape, *tokens.shape[1:])
        return packed.index_put((self.row, self.column), tokens)

    @torch.compiler.disable
    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(rows, row_length, ...) -> (N, ...), in the order of the sequences."""
        return packed[self.row, self.column]


def _round_up(size: int, multiple: int = 8) -> int:
    return -(-size // multiple) * multiple
