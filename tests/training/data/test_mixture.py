"""Mixtures: exact shares, every row once an epoch, the same run for everybody, and rows that cannot be read."""

from collections import Counter

import pytest
from image_bytes import png
from torch.utils.data import DataLoader

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.mixture import MAX_FAILURES, Mixture, Turns
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.data.sources import DatasetSource


def texts(name, count, **fields):
    return DatasetSource([{"text": f"{name} {i}"} | fields for i in range(count)], name)


def keys_of(mixture, positions=None):
    return [mixture[position]["row_key"] for position in positions or range(len(mixture))]


@pytest.mark.parametrize(
    "weights", [[1], [3, 1], [1, 1, 1], [0.1, 0.2, 0.7], [1] * 10, [100, 50, 25, 12, 6, 3, 1], [0.9] + [0.005] * 20]
)
def test_every_prefix_has_the_shares_of_the_weights(weights):
    turns, counts = Turns(weights), [0] * len(weights)
    for turn in range(2000):
        party, before = turns.at(turn)
        assert before == counts[party]
        counts[party] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (turn + 1) * weight / sum(weights)) < 1


def test_turns_far_away_are_exact():
    turns = Turns([3, 1])
    assert {turns.at(4 * 10**17 + i) for i in range(4)} == {
        (0, 3 * 10**17),
        (0, 3 * 10**17 + 1),
        (0, 3 * 10**17 + 2),
        (1, 10**17),
    }


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    mixture = Mixture([texts("a", 7), texts("b", 30)], [1, 1], seed=3, num_samples=60)
    keys = keys_of(mixture)
    ours = [key for key in keys if key.startswith("a:")]
    epochs = [ours[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == [f"a:{i}" for i in range(7)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert len({key for key in keys if key.startswith("b:")}) == 30


def test_a_position_decides_its_row_alone():
    def make(seed=3, num_samples=40):
        return Mixture([texts("a", 7), texts("b", 30)], [2, 1], seed, num_samples)

    whole = [make()[position] for position in range(40)]
    backwards = make(num_samples=400)
    assert [backwards[position] for position in reversed(range(40))] == whole[::-1]
    assert len({row["draw_seed"] for row in whole}) == 40
    assert keys_of(make(seed=4)) != keys_of(make())
    assert len(list(make())) == len(make()) == 40
    with pytest.raises(IndexError):
        make()[40]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_see_what_one_process_sees(tiny_processor, workers):
    rows = [{"image": png((i, 0, 0)), "captions": [f"{i}, {j}" for j in range(9)]} for i in range(20)]
    mixture = Mixture([DatasetSource(rows, "a"), texts("b", 9)], [2, 1], seed=0, num_samples=24)
    collator = MMGEMCollator(tiny_processor)

    def load(num_workers):
        loader = DataLoader(mixture, batch_size=4, collate_fn=collator, num_workers=num_workers)
        return [(batch["row_keys"], batch["input_ids"].tolist()) for batch in loader]

    assert load(workers) == load(0)


def test_ids_are_unique_across_sources():
    photos = [{"image": png("red"), "text": "a", "file_name": "a.png"}, {"image": png("red"), "text": "b"}]
    sources = [DatasetSource(photos, "x"), DatasetSource(photos, "y"), texts("z", 1)]
    rows = {row["row_key"]: row for row in Mixture(sources, None, seed=0, num_samples=6)}
    ids = {key: row.get("image_id") for key, row in rows.items()}
    assert ids == {"x:0": "x:a.png", "x:1": "x:1", "y:0": "y:a.png", "y:1": "y:1", "z:0": None}


def test_what_cannot_be_read_is_noted_and_replaced(tmp_path):
    rows = [{"image": png("red"), "text": f"fine {i}"} for i in range(8)]
    rows[1] = {"image": b"no image", "text": "a"}
    rows[2] = {"image": png("red"), "text": ""}
    rows[3] = {"image": png("red"), "text": 5}
    rows[4] = {"image": str(tmp_path / "gone.png"), "text": "a"}
    rows[5] = {"image": 3.5, "text": "a"}
    rows[6] = {"image": png("red"), "text": "a", "boxes": [[4, 4, 2, 2]], "region_captions": ["wrong corners"]}
    rows[7] = {"words": "no column that is known"}
    source = DatasetSource(rows, "photos")
    source.damaged.append(("x.tar", "is damaged"))

    def make(name):
        return Mixture([source], [1], seed=1, num_samples=24, skipped=SkippedLog(tmp_path / name))

    mixture = make("first")
    seen = list(mixture)
    assert {row["row_key"] for row in seen} == {"photos:0"}
    assert mixture.skipped.counts() == {"photos": 8}
    assert {key for _, key in mixture.skipped._added} == {*"1234567", "x.tar"}
    assert [row["draw_seed"] for row in make("second")] == [row["draw_seed"] for row in seen]
    assert mixture.texts(0).keys() == seen[0].keys()


def test_a_replacement_depends_on_the_position_alone():
    rows = [{"text": f"fine {i}"} if i % 2 else {"text": ""} for i in range(100)]
    rows[0] = {"text": "fine"}

    def make():
        return Mixture([DatasetSource(rows)], None, seed=1, num_samples=200)

    keys = keys_of(make())
    assert keys_of(make(), reversed(range(200))) == keys[::-1]
    assert max(Counter(keys).values()) < 20  # not one row for all


def test_a_source_that_cannot_be_read_at_all_ends_the_run():
    source = DatasetSource([{"text": "fine"}] + [{"text": ""}] * 5000, "photos")
    mixture = Mixture([source], None, seed=1, num_samples=10)
    with pytest.raises(ValueError, match=f"photos cannot be read: {MAX_FAILURES} of its rows failed.*expected text"):
        list(mixture)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -2], r"`weights\[1\]` is -2; expected 0 or more"),
        ([1, float("inf")], r"`weights\[1\]` is inf"),
        ([0, 0], "expected at least one above 0"),
        ([1], "`weights` has 1 numbers; expected one for each of 2 sources"),
    ],
)
def test_impossible_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture([texts("a", 2), texts("b", 2)], weights, seed=0, num_samples=4)


def test_a_weight_of_0_leaves_a_source_out():
    assert set(keys_of(Mixture([texts("a", 2), texts("b", 2)], [0, 1], seed=0, num_samples=4))) == {"b:0", "b:1"}
    with pytest.raises(ValueError, match="`num_samples` is 0"):
        Mixture([texts("a", 2)], None, seed=0, num_samples=0)
