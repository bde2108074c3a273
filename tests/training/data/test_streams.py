"""Streams: the same rows wherever one goes on, for every worker, epoch after epoch."""

import pickle

import datasets
import pytest
from image_bytes import png
from torch.utils.data import DataLoader, Subset

from mmgem.training.data import streams
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import load_rows, open_source
from mmgem.training.data.sources import DatasetSource
from mmgem.training.data.streams import StreamSource


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_SIZE", 8)
    monkeypatch.setattr(StreamSource, "block_size", 8)


@pytest.fixture
def section(tmp_path):
    """30 rows in 3 files, to be streamed."""
    rows = {"image": [{"bytes": png((i, 0, 0))} for i in range(30)], "text": [str(i) for i in range(30)]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features)
    datasets.disable_progress_bars()
    for number in range(3):
        data.select(range(10 * number, 10 * number + 10)).to_parquet(
            tmp_path / "data" / f"train-{number}-of-3.parquet"
        )
    return {"dataset": str(tmp_path / "data"), "streaming": True}


def numbers_of(rows):
    return [int(row["captions"][0]) for row in rows]


def make_mixture(section, num_samples=70, seed=0, **kwargs):
    return Mixture([open_source(section)], None, seed, num_samples, **kwargs)


def test_rows_in_order_for_evaluation(section):
    rows = load_rows(section)
    assert numbers_of(rows) == numbers_of(rows) == list(range(30))
    assert [row["image"].getpixel((0, 0))[0] for row in rows] == list(range(30))
    with pytest.raises(TypeError):
        len(rows)


@pytest.mark.parametrize("count", [7, 8, 16, 17])
def test_an_epoch_ends_where_the_data_ends(count):
    data = datasets.IterableDataset.from_generator(lambda: ({"text": str(i)} for i in range(count)))
    source = StreamSource(data, "x")
    assert numbers_of(source) == numbers_of(source) == list(range(count))
    assert numbers_of(source[i] for i in range(2 * count)) == [*range(count)] * 2
    for start in (2 * count + 3, 2 * count):
        assert numbers_of([StreamSource(data, "x")[start]]) == [start % count]


def test_every_epoch_has_every_row_in_another_order(section):
    numbers = numbers_of(make_mixture(section, num_samples=150))
    assert sorted(numbers[:120]) == sorted([*range(30)] * 4)  # 4 epochs, 15 blocks
    assert numbers[:30] != numbers[120:]
    blocks = [sorted(numbers[start : start + 8]) for start in (0, 120)]
    blocks += [sorted(numbers_of(make_mixture(section, 8, seed))) for seed in range(9)]
    assert {block[0] // 10 for block in blocks} == {0, 1, 2}  # any file may come first
    assert all(block == list(range(block[0], block[0] + 8)) for block in blocks)
    assert all(numbers[start : start + 8] != sorted(numbers[start : start + 8]) for start in range(0, 144, 8))


def test_it_goes_on_anywhere(section):
    whole = list(make_mixture(section))
    for start in (5, 8, 29, 30, 61):
        resumed = make_mixture(section)
        assert [resumed[i]["row_key"] for i in range(start, 70)] == [row["row_key"] for row in whole[start:]]
        assert resumed[start]["captions"] == whole[start]["captions"]
        assert resumed[start - 5]["captions"] == whole[start - 5]["captions"]  # backwards too


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_see_what_one_process_sees(section, workers):
    other = DatasetSource([{"text": str(100 + i)} for i in range(5)])

    def load(num_workers, ahead=0):
        mixture = Mixture([open_source(section), other], [2, 1], seed=0, num_samples=60)
        for i in range(ahead):
            mixture[i]  # a file is open when the workers are forked
        return list(DataLoader(mixture, batch_size=4, num_workers=num_workers, collate_fn=numbers_of))

    assert load(workers) == load(workers, ahead=3) == load(0)


def test_workers_do_not_share_an_open_file(tmp_path):
    tmp_path.joinpath("numbers").write_text("".join(f"{i:03d}" for i in range(200)))

    def rows():
        with open(tmp_path / "numbers", "rb", buffering=0) as file:
            while text := file.read(3):
                yield {"text": text.decode()}

    source = StreamSource(datasets.IterableDataset.from_generator(rows), "x")
    source[3]
    loader = DataLoader(Subset(source, range(200)), batch_size=8, num_workers=2, collate_fn=numbers_of)
    assert [number for batch in loader for number in batch] == list(range(200))


def test_bad_rows_are_replaced_by_others_of_their_block():
    rows = [{"text": str(i) if i % 3 else ""} for i in range(32)]
    source = StreamSource(datasets.IterableDataset.from_generator(lambda: iter(rows)), "x")
    mixture = Mixture([source], None, seed=0, num_samples=32)
    numbers = numbers_of(mixture)
    assert mixture.skipped.counts() == {"x": 11} and all(number % 3 for number in numbers)
    assert [number // 8 for number in numbers] == [position // 8 for position in range(32)]


def test_a_stream_that_breaks_ends_the_run():
    def rows():
        yield from [{"text": "a"}] * 20
        raise ConnectionError("no route")

    source = StreamSource(datasets.IterableDataset.from_generator(rows), "x")
    with pytest.raises(RuntimeError, match="x broke off in epoch 0: .*no route"):
        source[30]
    features = datasets.Features({"text": datasets.Value("string")})
    empty = StreamSource(datasets.IterableDataset.from_generator(lambda: iter(()), features=features), "x")
    with pytest.raises(RuntimeError, match="x has no rows"):
        empty[0]


def test_columns_are_checked_at_the_door(section):
    with pytest.raises(
        ValueError, match="no column `words`, which `columns` gives for `captions`; it has image, text"
    ):
        open_source(section | {"columns": {"captions": "words"}})
    unknown = datasets.IterableDataset.from_generator(lambda: iter([{"img": png("red"), "text": "a"}]))
    with pytest.raises(ValueError, match="no column `image`; it has img, text"):
        StreamSource(unknown, "x")


def test_it_can_be_sent_to_another_process(section):
    source = open_source(section)
    first = source[11]["captions"]
    assert pickle.loads(pickle.dumps(source))[11]["captions"] == first
