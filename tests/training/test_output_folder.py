"""Nothing half written is left where a folder should be, and a second attempt is like the first."""

import json
import os
from contextlib import suppress

import pytest
from safetensors import SafetensorError
from tiny_models import build_model
from typer.testing import CliRunner

from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training import cli, soup
from mmgem.training.cli_common import write_table
from mmgem.training.json_text import write_json
from mmgem.training.output_folder import check_writable, whole_file, whole_folder


def write(folder, text):
    (folder / "sub").mkdir()
    (folder / "sub" / "inner.txt").write_text(text)
    (folder / "file.txt").write_text(text)


@pytest.mark.parametrize("before", ["nothing", "empty", "full"])
@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_folder_is_whole_or_as_it_was(tmp_path, before, error):
    out = tmp_path / "out"
    if before != "nothing":
        out.mkdir()
    if before == "full":
        write(out, "old")
        (out / "own.txt").write_text("own")
    was = sorted(out.rglob("*"))
    with pytest.raises(type(error)), whole_folder(out) as folder:
        write(folder, "half")
        raise error
    assert sorted(out.rglob("*")) == was and [path.name for path in tmp_path.iterdir()] == ["out"] * out.exists()
    with whole_folder(out) as folder:
        write(folder, "new")
    assert (out / "file.txt").read_text() == (out / "sub" / "inner.txt").read_text() == "new"
    assert not list(tmp_path.rglob("*partial*")) and (out / "own.txt").exists() == (before == "full")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "table.csv"
    for error in (None, OSError):
        with suppress(OSError), whole_file(file) as partial:
            partial.write_text(f"{error}")
            if error:
                raise error
    assert file.read_text() == "None" and os.listdir(tmp_path) == [file.name]


def test_a_table_is_written_through_a_link_whose_place_a_file_of_the_run_takes(tmp_path):
    file, link = tmp_path / "table.csv", tmp_path / "link.csv"
    link.symlink_to(file)
    write_table([{"score": 1}], link)
    assert link.is_symlink() and file.read_text() == "score\n1\n"
    write_json(link, {"loss": float("nan")})
    assert not link.is_symlink() and json.loads(link.read_text()) == {"loss": None}
    assert file.read_text() == "score\n1\n" and len(os.listdir(tmp_path)) == 2


def test_a_file_that_is_written_leaves_its_neighbours(tmp_path):
    (tmp_path / "table.partial").write_text("of the user")
    with whole_file(tmp_path / "table.csv") as partial:
        partial.write_text("new")
    assert (tmp_path / "table.partial").read_text() == "of the user"


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"Input/output error: '.*table\.csv'"), whole_file(tmp_path / "table.csv"):
        raise OSError(5, "Input/output error")
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_written_is_refused_and_one_that_can_stays_as_it_is(tmp_path):
    file = tmp_path / "table.csv"
    check_writable(file, "--table")
    assert not file.exists()
    file.write_text("old")
    check_writable(file, "--table")
    assert file.read_text() == "old"
    with pytest.raises(IsADirectoryError, match="`--table` is '.*', which cannot be written .Is a directory"):
        check_writable(tmp_path, "--table")


@pytest.fixture
def full_disk(monkeypatch):
    """The first attempt to save finds no room, as safetensors says it."""
    attempts = []

    def save(model, processor, folder):
        save_sentence_transformer(model, processor, folder)
        attempts.append(folder)
        if len(attempts) == 1:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(soup, "save_sentence_transformer", save)


def test_a_soup_on_a_full_disk_takes_a_line_and_can_be_made_again(tmp_path, tiny_processor, full_disk):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        build_model().save_pretrained(folder)
        tiny_processor.save_pretrained(folder)
    arguments = ["soup", str(tmp_path / "out"), *map(str, folders)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1] == f"mmgem: [Errno 28] No space left on device: '{tmp_path / 'out'}'"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*partial*"))
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert set(json.loads((tmp_path / "out" / "soup.json").read_text()).values()) == {0.5}
