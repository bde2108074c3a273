import torch

from mmgem.packing import PackedLayout


def test_pack_then_unpack_gives_the_tokens_back():
    layout = PackedLayout([3, 7, 2, 5, 7, 1], torch.device("cpu"))
    tokens = torch.arange(25 * 2).view(25, 2)
    assert torch.equal(layout.unpack(layout.pack(tokens)), tokens)


def test_positions_restart_with_each_sequence():
    layout = PackedLayout([2, 3, 1], torch.device("cpu"))
    assert layout.unpack(layout.position_ids).tolist() == [0, 1, 0, 1, 2, 0]
    assert layout.unpack(layout.segment_ids).tolist() == [0, 0, 1, 1, 1, 2]


def test_rows_are_filled_before_new_ones_are_opened():
    layout = PackedLayout([8, 5, 6, 3, 2] * 8, torch.device("cpu"))
    assert layout.shape == (24, 8)  # 8 | 6 + 2 | 5 + 3
    assert (layout.segment_ids == -1).sum() == 0


def test_long_sequences_are_laid_first_so_that_short_ones_fill_their_rows():
    assert PackedLayout([3, 3, 5, 5], torch.device("cpu")).shape == (2, 8)  # as they come they would take 3 rows


def test_shapes_recur():
    shapes = {PackedLayout([16] * 60 + [length] * 4, torch.device("cpu")).shape for length in range(9, 17)}
    assert shapes == {(64, 16)}
    assert PackedLayout([9], torch.device("cpu")).shape == (1, 16)


def test_few_rows_are_rounded_up_by_an_eighth_at_most():
    shapes = [PackedLayout([8] * rows, torch.device("cpu")).shape[0] for rows in (1, 9, 15, 17, 33, 65, 129)]
    assert shapes == [1, 9, 15, 18, 36, 72, 136]


def test_one_sequence_per_row_is_padded_on_the_right_to_the_longest():
    layout = PackedLayout([2, 5, 1], torch.device("cpu"), one_per_row=True)
    assert layout.shape == (3, 5) and layout.segment_ids[:, 0].sort().values.tolist() == [0, 1, 2]
    tokens = torch.arange(8)
    assert torch.equal(layout.unpack(layout.pack(tokens)), tokens)
    assert PackedLayout([2] * 17, torch.device("cpu"), one_per_row=True).shape == (17, 2)
    assert (layout.segment_ids[:, 1:] <= layout.segment_ids[:, :-1]).all()  # nothing behind a tail, nor two in a row
