"""Streams: the same rows wherever one goes on, each reader its share of them, epoch after epoch."""

import io
import os
import pickle
from collections import Counter
from zipfile import ZipFile

import datasets
import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets.utils import file_utils
from image_bytes import png
from torch.utils.data import BatchSampler, DataLoader, Subset

from mmgem.training.data import streams
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import load_rows, open_source
from mmgem.training.data.sources import DatasetSource
from mmgem.training.data.streams import StreamSource


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_SIZE", 8)
    monkeypatch.setattr(StreamSource, "block_size", 8)
    monkeypatch.setattr(streams, "BOOKMARK_EVERY", 16)


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


def rows_of(source, indices):
    return numbers_of(source[index] for index in indices)


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


@pytest.mark.parametrize("place", ["zip://a.png::{}", "local://{}", "hf://datasets/o/n/a.png"])
def test_paths_in_rows_of_a_stream_lead_nowhere_else(tmp_path, monkeypatch, place):
    archive = tmp_path / "other.zip"
    with ZipFile(archive, "w") as file:
        file.writestr("a.png", png((9, 0, 0)))
    row = {"image": {"bytes": None, "path": place.format(archive)}, "text": "0"}
    source = StreamSource(datasets.IterableDataset.from_generator(lambda: iter([row])), "x")
    if place.startswith("hf"):
        monkeypatch.setattr(file_utils, "xopen", lambda path, mode: io.BytesIO(png((9, 0, 0))))
        assert source[0]["image"].getpixel((0, 0)) == (9, 0, 0)
        return
    with pytest.raises(ValueError, match="which may lead out of the data; expected a file of the Hub"):
        source[0]
    if place.startswith("zip"):
        source.allow_outside_paths = True
        assert source[0]["image"].getpixel((0, 0)) == (9, 0, 0)


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


# Parts


def read_files(files, log):
    """40 rows of each file; every one that is read is noted with the process that reads it."""
    with open(log, "a", buffering=1) as lines:
        for file in files:
            for number in range(40 * file, 40 * file + 40):
                lines.write(f"{os.getpid()} {number}\n")
                yield {"text": str(number)}


def make_stream(log, num_files=8):
    log.touch()
    arguments = {"files": list(range(num_files)), "log": str(log)}
    return StreamSource(datasets.IterableDataset.from_generator(read_files, gen_kwargs=arguments), "x")


def reads_of(log):
    """The rows that were read since the last call, for each process."""
    reads = Counter(line.split()[0] for line in log.read_text().splitlines())
    os.truncate(log, 0)
    return reads


def test_each_worker_reads_its_share(tmp_path):
    log = tmp_path / "log"

    def load(num_workers, num_readers, rows=256):
        mixture = Mixture([make_stream(log)], None, seed=0, num_samples=320)
        mixture.split_streams(4, num_readers)
        reads_of(log)
        loader = DataLoader(mixture, 4, num_workers=num_workers, collate_fn=numbers_of, sampler=range(rows))
        return [number for batch in loader for number in batch]

    rows = load(2, num_readers=2)
    first, second = reads_of(log).values()
    assert 128 <= min(first, second) and max(first, second) <= 128 + 8  # of 256, in blocks of 8
    assert load(0, num_readers=2) == rows != load(0, num_readers=1)  # a run is the same whoever reads it
    reads_of(log)
    assert load(2, num_readers=4) == load(0, num_readers=4) != rows
    reads_of(log)
    load(2, num_readers=3)  # whose batches fall to both workers
    assert max(reads_of(log).values()) <= 256 + 3 * 8


@pytest.mark.parametrize("skipped", [0, 3])
def test_workers_of_several_processes_read_their_shares(tmp_path, skipped):
    """With the batches that accelerate gives to each process, also where a resumed run begins."""
    log = tmp_path / "log"
    mixture = Mixture([make_stream(log)], None, seed=0, num_samples=320)
    mixture.split_streams(4, num_readers=4)
    batches = BatchSampler(range(256), 4, drop_last=False)
    for rank in range(2):
        own = SkipBatchSampler(BatchSamplerShard(batches, 2, rank), skip_batches=skipped)
        reads_of(log)
        loader = DataLoader(mixture, batch_sampler=own, num_workers=2, collate_fn=list)
        assert len(list(loader)) == 32 - skipped
        reads = reads_of(log).values()
        assert len(reads) == 2 and max(reads) <= 256 // 4 + 8


@pytest.mark.parametrize("num_readers", [2, 4, 8, 16])
def test_parts_make_up_an_epoch(tmp_path, num_readers):
    """Files are divided among up to 8 readers; 16 divide the rows."""
    stream = make_stream(tmp_path / "log").shuffled(3)
    size = 320 // num_readers
    for epoch in range(2):
        parts = [
            rows_of(stream.part(reader, num_readers), range(epoch * size, (epoch + 1) * size))
            for reader in range(num_readers)
        ]
        assert sorted(sum(parts, [])) == list(range(320))
        assert sum(parts, [])[::size] != list(range(0, 320, size))
    keys = {stream.part(reader, num_readers).key(0) for reader in range(num_readers)}
    assert len(keys) == num_readers


def test_sources_keep_their_shares_with_several_readers(tmp_path):
    other = DatasetSource([{"text": str(1000 + i)} for i in range(40)])
    mixture = Mixture([make_stream(tmp_path / "log"), other], [3, 1], seed=0, num_samples=160)
    mixture.split_streams(4, 2)
    numbers = numbers_of(mixture)
    assert sorted(number for number in numbers if number >= 1000) == list(range(1000, 1040))  # each once in an epoch
    assert len({number for number in numbers if number < 1000}) == 120
    assert all(abs(sum(number < 1000 for number in numbers[:end]) - 0.75 * end) <= 2 for end in range(0, 160, 8))


def test_without_streams_the_readers_do_not_matter():
    def keys(**split):
        mixture = Mixture([DatasetSource([{"text": str(i)} for i in range(9)])], None, seed=0, num_samples=30)
        if split:
            mixture.split_streams(**split)
        return [row["row_key"] for row in mixture]

    assert keys() == keys(batch_size=4, num_readers=3)
    with pytest.raises(ValueError, match="`num_readers` is 0; expected 1 or more"):
        keys(batch_size=4, num_readers=0)


# Bookmarks


@pytest.mark.parametrize("num_readers", [1, 2, 3, 5], ids=lambda n: f"{n} readers")
@pytest.mark.parametrize("form", ["parquet", "generator"])
def test_bookmarks_lead_to_the_same_rows(section, tmp_path, form, num_readers):
    """For 3 files that are read as tables, and 3 that are read by row, divided by file and by row."""

    source = open_source(section) if form == "parquet" else make_stream(tmp_path / "log", num_files=3)

    def part(bookmarks=None):
        return source.shuffled(1).part(num_readers - 1, num_readers, bookmarks)

    whole = rows_of(part(tmp_path / "marks"), range(150))
    assert len((tmp_path / "marks").read_text().splitlines()) >= 5
    for start in (0, 16, 17, 75, 149):
        assert rows_of(part(), range(start, start + 1)) == whole[start : start + 1]
        assert rows_of(part(tmp_path / "marks"), range(start, 150)) == whole[start:]


def test_what_a_bookmark_skips_is_not_read(tmp_path):
    log = tmp_path / "log"
    source = make_stream(log).part(0, 2, tmp_path / "marks")
    reads_of(log)
    row = source[130]["captions"]
    assert sum(reads_of(log).values()) == 136
    resumed = make_stream(log).part(0, 2, tmp_path / "marks")
    reads_of(log)
    assert resumed[130]["captions"] == row
    assert sum(reads_of(log).values()) <= 40 + 16 + 8  # of its file, to the bookmark, and on
    assert resumed[2]["captions"] == ["2"] and resumed[130]["captions"] == row


def test_a_bookmark_that_does_not_hold_is_not_used(tmp_path, caplog):
    def part(first, marks=None):
        rows = [{"text": str(i)} for i in range(first, first + 100)]
        stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
        return StreamSource(stream, "x").part(0, 1, marks)

    part(0, tmp_path / "marks")[90]
    assert part(500, tmp_path / "marks")[90]["captions"] == ["590"]  # the data have changed
    assert "the bookmark of x at row 80 does not hold" in caplog.text
    part(0, tmp_path / "marks")[90]
    with open(tmp_path / "marks", "a") as file:
        file.write('{"row": 88, "epo')  # cut off
    assert part(0, tmp_path / "marks")[90]["captions"] == ["90"]


def test_a_shuffle_buffer_is_not_resumed_wrongly():
    """The state of such a stream leaves out its buffer."""

    def make():
        stream = datasets.IterableDataset.from_generator(lambda: ({"text": str(i)} for i in range(200)))
        return StreamSource(stream.shuffle(seed=0, buffer_size=50), "x")

    source = make()
    rows = numbers_of(source[i] for i in range(200))
    assert sorted(rows) == list(range(200)) and numbers_of([source[40]]) == numbers_of([make()[40]]) == rows[40:41]


def test_a_part_without_rows_is_named(tmp_path):
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"text": "a"}]))
    with pytest.raises(RuntimeError, match="x has no rows for reader 1 of 2; expected at least one"):
        StreamSource(stream, "x").part(1, 2)[0]
