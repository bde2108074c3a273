"""Batches by tokens: below the budget, alike in length, every row once, the same for everybody."""

import random

import datasets
import pytest
from accelerate.data_loader import BatchSamplerShard
from image_bytes import png

from mmgem.training.data.batching import TokenBudgetBatchSampler
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.sources import DatasetSource
from mmgem.training.data.streams import StreamSource

LENGTHS = random.Random(0).choices(range(1, 41), k=300)


def count_words(row):
    return len(row["captions"][0].split())


def make_mixture(lengths=LENGTHS, num_samples=None):
    rows = [{"text": "word " * length} for length in lengths]
    return Mixture([DatasetSource(rows)], None, seed=0, num_samples=num_samples or len(lengths))


def make_sampler(max_tokens=200, window_size=100, **kwargs):
    return TokenBudgetBatchSampler(make_mixture(**kwargs), max_tokens, count_words, window_size)


def test_batches_stay_below_the_budget_and_use_it():
    sampler = make_sampler()
    batches = list(sampler)
    lengths = [[count_words(sampler.dataset[position]) for position in batch] for batch in batches]
    totals = [sum(own) for own in lengths]
    assert max(totals) <= 200 and sum(totals) / len(totals) > 170
    assert sum(max(own) - min(own) for own in lengths) / len(lengths) < 5  # 39 / 3 windows / 10 batches = 1.3
    assert max(map(len, batches)) > 2 * min(map(len, batches))


def test_rows_come_once_and_all_but_the_last_few():
    batches = list(make_sampler())
    positions = [position for batch in batches for position in batch]
    assert len(positions) == len(set(positions)) > 280
    assert list(make_sampler()) == batches  # for every process and after a restart
    firsts = [len(batch) for batch in batches[:10]]
    assert firsts != sorted(firsts, reverse=True)  # short and long ones are mixed


def test_a_small_data_set_is_one_batch():
    (batch,) = make_sampler(lengths=[3, 1, 2])
    assert sorted(batch) == [0, 1, 2]


def test_rows_that_do_not_fit_are_noted():
    sampler = make_sampler(lengths=[5, 300, 6])
    assert sorted(sum(sampler, [])) == [i for i in range(3) if count_words(sampler.dataset[i]) < 300]
    assert sampler.dataset.skipped.counts() == {"data": 1}
    with pytest.raises(ValueError, match="`max_tokens` is 2; expected more, no row of 3 fits"):
        list(make_sampler(lengths=[5, 4, 6], max_tokens=2))


@pytest.mark.parametrize("even_batches", [False, True])
def test_two_processes_share_the_batches(even_batches):
    batches = list(make_sampler())
    shares = [list(BatchSamplerShard(make_sampler(), 2, rank, even_batches=even_batches)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(batches) // 2
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == batches[: 2 * len(shares[0])]


def test_with_the_collator(tiny_processor):
    rows = [{"image": png("red"), "captions": ["word " * n, "other " * n]} for n in range(1, 40)]
    mixture = Mixture([DatasetSource(rows)], None, seed=0, num_samples=39)
    collator = MMGEMCollator(tiny_processor)
    batches = list(TokenBudgetBatchSampler(mixture, 400, collator.count_tokens))
    assert len(batches) > 5
    for batch in batches:
        lengths = collator([mixture[position] for position in batch])["attention_mask"].sum(-1)
        assert (2 * lengths + tiny_processor.num_visual_tokens).sum() <= 400


def test_impossible_arguments():
    with pytest.raises(ValueError, match="`max_tokens` is 0; expected 1 or more"):
        make_sampler(max_tokens=0)
    with pytest.raises(TypeError, match="`dataset` is a list; expected a Mixture"):
        TokenBudgetBatchSampler([{"text": "a"}], 10, count_words)
    stream = StreamSource(datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}])), "x")
    with pytest.raises(TypeError, match="has the stream x; expected sources whose rows can be read twice"):
        TokenBudgetBatchSampler(Mixture([stream], None, seed=0, num_samples=5), 10, count_words)
