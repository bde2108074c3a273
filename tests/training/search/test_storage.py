import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.settings import IndexSettings
from mmgem.training.search.storage import (
    FACTS_FILE,
    PROBES_FILE,
    ArrayColumn,
    IndexFacts,
    is_index,
    read_rows,
    write_rows,
)


@pytest.fixture
def facts():
    fingerprint = Fingerprint(
        {"prompts": {"query": "Wo ist … "}}, {"text": torch.randn(2, 5), "memory": torch.ones(1, 3)}
    )
    return IndexFacts("/images", "a/model", IndexSettings(2, 5, "int8", 1), fingerprint, bound=0.7)


def test_facts_come_back_as_they_were(facts, tmp_path):
    facts.write(tmp_path)
    assert is_index(tmp_path) and sorted(path.name for path in tmp_path.iterdir()) == [PROBES_FILE, FACTS_FILE]
    assert (tmp_path / PROBES_FILE).stat().st_mode == (tmp_path / FACTS_FILE).stat().st_mode
    read = IndexFacts.read(tmp_path, "index")
    assert (read.folder, read.model, read.settings, read.bound) == ("/images", "a/model", facts.settings, 0.7)
    assert read.fingerprint.difference(facts.fingerprint) is None
    assert read.codec == facts.codec and facts.codec.bound == 0.7


def test_folders_that_are_no_index_of_this_format_are_refused_by_a_sentence(facts, tmp_path):
    with pytest.raises(ValueError, match=f"`out` is .*no index; expected a folder with {FACTS_FILE}"):
        IndexFacts.read(tmp_path, "out")
    earlier = {"folder": "/images", "model": "a/model", "probe": [0.1, 0.2]}
    (tmp_path / FACTS_FILE).write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="`index` is .*of format 1; expected format 2. Delete it, and make it anew"):
        IndexFacts.read(tmp_path, "index")
    for broken in ("{", "[]", '{"format": 2}'):
        (tmp_path / FACTS_FILE).write_text(broken)
        with pytest.raises(ValueError, match="damaged; expected a whole one. Delete it, and make it anew"):
            IndexFacts.read(tmp_path, "index")
    facts.write(tmp_path)
    for broken in (b"", b"not tensors"):
        (tmp_path / PROBES_FILE).write_bytes(broken)
        with pytest.raises(ValueError, match="damaged; expected a whole one. Delete it, and make it anew"):
            IndexFacts.read(tmp_path, "index")


def test_rows_come_back_in_their_own_precision(tmp_path):
    generator = np.random.default_rng(0)
    columns = {
        "file_name": [f"{number}.png" for number in range(5)],
        "width": list(range(5)),
        "embedding": generator.integers(0, 256, (5, 2, 3), dtype=np.uint8),
        "memory": generator.normal(size=(5, 2, 4)).astype(np.float16),
    }
    first, second = ({name: column[part] for name, column in columns.items()} for part in (slice(3), slice(3, 5)))
    write_rows(tmp_path / "rows.arrow", [first, second])
    rows = read_rows(tmp_path / "rows.arrow")
    assert isinstance(rows, Dataset) and len(rows) == 5
    assert rows["file_name"][:] == columns["file_name"] and rows["width"][:] == columns["width"]
    for name in ("embedding", "memory"):
        read = ArrayColumn(rows, name)[:]
        assert read.dtype == columns[name].dtype
        np.testing.assert_array_equal(read, columns[name])
        np.testing.assert_array_equal(ArrayColumn(rows, name)[[4, 0, 4]], columns[name][[4, 0, 4]])
        np.testing.assert_array_equal(ArrayColumn(rows.select([3, 1]), name)[range(1, 2)], columns[name][[1]])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrow"]
