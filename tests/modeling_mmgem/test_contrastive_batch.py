"""Ids of texts and images, and what two processes make of the batches of both."""

import itertools

import pytest
import torch
from contrastive_batches import image_batch, mixed_batch, part_of, unit_rows
from forked_ranks import forked_ranks

from mmgem.contrastive_batch import (
    COLUMNS,
    default_image_ids,
    gather_rows,
    gather_sizes,
    ids_of_rows,
    is_distributed,
    token_row_ids,
)


def padded(*texts: list[int], side: str = "right", to: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, where padding is the token 5, and the attention mask."""
    length = to or max(map(len, texts))
    ids, mask = torch.full((len(texts), length), 5), torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(length - len(text), length) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text, dtype=torch.long), 1
    return ids, mask


def test_ids_of_texts_depend_on_all_tokens_and_not_on_padding():
    texts = [*itertools.product([0, 1, 2, 7], repeat=3), *itertools.product([0, 1, 2, 7], repeat=2), (), (5, 5, 5)]
    long = list(range(200))  # powers of an even number would vanish
    texts = [list(text) for text in texts] + [long, [*long[:-1], 0], [0, *long], [1, *long[1:]]]
    ids = token_row_ids(*padded(*texts))
    assert ids.dtype == torch.int64 and len(ids.unique()) == len(texts)
    for side in ("left", "right"):
        torch.testing.assert_close(token_row_ids(*padded(*texts, side=side, to=230)), ids)


def test_ids_of_texts_after_images_depend_on_both_and_on_the_order_of_the_images():
    image_ids = torch.tensor([0, 1, 8, 9])
    many = [0] * 70
    images = [[], [0], [1], [2], [3], [0, 1], [1, 0], [0, 0], [1, 1, 0], many, [*many[:-1], 1]]
    fused = torch.full((len(images), 72), -1)
    for row, numbers in enumerate(images):
        fused[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    ids = [ids_of_rows(*padded(*[text] * len(images)), fused, image_ids) for text in ([], [0], [7, 7])]
    assert len(torch.cat(ids).unique()) == 3 * len(images)
    # Those of a text alone are the ids of the text; copies of an image have one id, wherever they are in a batch.
    assert ids[2][0] == token_row_ids(*padded([7, 7]))
    copies = ids_of_rows(*padded([7], [7]), torch.tensor([[0, -1], [-1, 1]]), torch.tensor([4, 4]))
    assert copies[0] == copies[1]
    twice = ids_of_rows(*padded([7], [7], [7]), torch.tensor([[0, 1], [0, 1], [1, 0]]), torch.tensor([4, 5]))
    assert twice[0] == twice[1] != twice[2]


def test_images_without_ids_get_numbers_of_their_own():
    assert default_image_ids(3, torch.device("cpu")).tolist() == [0, 1, 2]


def test_two_processes_put_their_rows_together_in_the_order_of_ranks(tmp_path):
    batch = mixed_batch()
    deal = ([0, 1, 4, 5, 6, 7, 10, 11, 8], [0, 3, 4, 5, 8]), ([2, 3, 9], [1, 2, 6, 7])
    assert not is_distributed() and gather_sizes(4, torch.device("cpu")) == [4]
    assert gather_rows(batch.query_ids, [len(batch.query_ids)]) is batch.query_ids

    def on_rank(rank: int) -> dict:
        own = part_of(batch, *deal[rank])
        gathered = own.gather()
        loss = (gathered.query_embeds.cumsum(0) ** 2).sum()
        of_no_row = gather_rows(torch.zeros(0, 3), [0, 0])
        single = gather_rows(torch.tensor([[1.0, 2.0]])[rank:], [1, 0])
        return {
            "is_distributed": is_distributed(),
            "sizes": gather_sizes(rank + 2, torch.device("cpu")),
            "columns": {name: value.detach() for name, value in gathered.items()},
            "gradient": torch.autograd.grad(loss, own.query_embeds)[0],
            "shapes": [tuple(of_no_row.shape), tuple(single.shape)],
            "needs_gradient": [gathered[name].requires_grad for name in ("query_embeds", "query_ids")],
            "image_ids": default_image_ids(3, torch.device("cpu")),
        }

    results = forked_ranks(on_rank, tmp_path)
    whole = part_of(batch, *(first + second for first, second in zip(*deal, strict=True)))
    loss = (whole.query_embeds.cumsum(0) ** 2).sum()
    gradients = torch.autograd.grad(loss, whole.query_embeds)[0].split([len(queries) for queries, _ in deal])
    for result, gradient in zip(results, gradients, strict=True):
        assert result["is_distributed"] and result["sizes"] == [2, 3] and result["shapes"] == [(0, 3), (1, 2)]
        assert result["needs_gradient"] == [True, False]
        for name in itertools.chain(*COLUMNS.values()):
            torch.testing.assert_close(result["columns"][name], whole[name].detach(), msg=name)
        torch.testing.assert_close(result["gradient"], 2 * gradient)  # that of the losses of both
    assert len({*torch.cat([result["image_ids"] for result in results]).tolist()}) == 6
    assert results[1]["image_ids"].min() > 1 << 31  # as far apart as no process has images


@pytest.mark.parametrize("first", [0, 1])
def test_a_query_for_a_target_of_another_modality_is_refused(first):
    batch = image_batch(unit_rows(2), unit_rows(1), target_index=[first])
    batch.check()
    batch.query_modality += 1
    with pytest.raises(ValueError, match="`query_modality` differs from the `target_modality`"):
        batch.check()
