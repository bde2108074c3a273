import errno
import json
import os
import threading
import time

import pytest
from typer.testing import CliRunner

from mmgem.training import output_lock
from mmgem.training.captioning import caption_folder
from mmgem.training.cli import app
from mmgem.training.data.image_folder import read_image_folder
from mmgem.training.demo.run import run_demo
from mmgem.training.evaluation.calibration import write_calibrated
from mmgem.training.onnx_export import export_onnx
from mmgem.training.output_lock import not_written, one_writer, only_writer, waiting
from mmgem.training.recipes.check import check_recipe
from mmgem.training.recipes.run import train
from mmgem.training.scenes.dataset import write_scene_folder
from mmgem.training.search.building import build_index
from mmgem.training.soup import soup

WRITERS = {  # each with `out` only; what else they are given is not looked at before the lock
    caption_folder: lambda out: caption_folder("images", None, None, out),
    build_index: lambda out: build_index("images", None, None, out),
    run_demo: lambda out: run_demo(out, None, None),
    write_scene_folder: lambda out: write_scene_folder(out, 0, 0),
    soup: lambda out: soup([], out),
    write_calibrated: lambda out: write_calibrated(None, None, "data", out),
    export_onnx: lambda out: export_onnx(None, None, out, [], []),
    train: lambda out: train("recipe.yaml", out),
    check_recipe: lambda out: check_recipe("recipe.yaml", out),
}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out"


@pytest.fixture
def other_job(out):
    """A process that holds the lock of `out`; call it to let go, or to kill it."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with only_writer(out):
            os.write(ready[1], b".")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    ended = []

    def end(kill=False):
        if not ended:
            ended.append(child)
            os.kill(child, 9) if kill else os.write(done[1], b".")
            os.waitpid(child, 0)

    end.pid = child
    yield end
    end()


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_every_writer_is_refused_by_the_name_of_the_job_that_writes(writer, out, other_job):
    with pytest.raises(BlockingIOError, match=f"`out` is '{out}', which process {other_job.pid} on .* is writing"):
        WRITERS[writer](out)
    assert os.listdir(out.parent) == ["out.lock"]


def test_a_job_that_was_killed_holds_nothing(out, other_job):
    other_job(kill=True)
    assert os.path.exists(f"{out}.lock")
    with only_writer(out):
        pass
    assert os.listdir(out.parent) == []


def test_who_waits_goes_on_when_the_other_ends(out, other_job):
    threading.Timer(0.2, other_job).start()
    with waiting(), only_writer(out):
        assert json.loads(open(f"{out}.lock").read())["pid"] == os.getpid()


def test_a_lock_is_its_holders_again_and_its_of_no_other_thread(out):
    """As a demonstration calls what writes its parts."""
    inside = one_writer(lambda out: refusals.append(None))
    refusals = []

    def try_in_thread():
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
            inside(out)
        refusals.append("refused")

    with only_writer(out):
        inside(out)
        thread = threading.Thread(target=try_in_thread)
        thread.start()
        thread.join()
        assert os.path.exists(f"{out}.lock")
    assert refusals == [None, "refused"] and not os.path.exists(f"{out}.lock")
    inside(out=str(out))


def test_one_place_has_one_lock_by_whichever_path(out, tmp_path, monkeypatch, other_job):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(out.parent)
    for path in ("deep/out", "deep/../deep/out", tmp_path / "link" / "out"):
        with pytest.raises(BlockingIOError), only_writer(path):
            pass


def test_of_many_at_once_one_writes_at_a_time(out, tmp_path):
    """Also as locks are deleted and made: each adds one to a number that it reads and writes."""
    (tmp_path / "number").write_text("0")

    def add():
        for _ in range(10):
            with waiting(), only_writer(out):
                number = int((tmp_path / "number").read_text())
                time.sleep(0.0005)
                (tmp_path / "number").write_text(str(number + 1))

    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            add()
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (tmp_path / "number").read_text() == "40"


def test_the_command_line_waits_when_it_is_told_to(out, other_job):
    result = CliRunner().invoke(app, ["scenes", str(out), "--count", "2"])
    assert result.exit_code == 1 and f"process {other_job.pid} on" in result.stderr
    threading.Timer(0.2, other_job).start()
    assert CliRunner().invoke(app, ["scenes", str(out), "--count", "2", "--wait"]).exit_code == 0
    assert len(read_image_folder(out)) == 2


@pytest.mark.parametrize("holder", [b"", b"\0\xff{", b"123", b'{"pid": 1, "host": "elsewhere"}'], ids=repr)
def test_a_lock_that_nobody_holds_is_taken_whatever_is_in_it(out, holder):
    """As one that is left by a machine that went down, or whose process has here the number of another one."""
    out.parent.mkdir()
    out.with_name("out.lock").write_bytes(holder)
    with only_writer(out):
        pass
    assert os.listdir(out.parent) == []


def test_a_file_system_without_locks_is_refused(out, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with waiting(), pytest.raises(OSError, match="`out` is .*, on a file system without locks .*; expected a place"):
        with only_writer(out):
            pass
    monkeypatch.undo()
    with only_writer(out):  # what is left of it is no lock
        pass


def test_an_unreadable_holder_is_another_process(tmp_path):
    (tmp_path / "lock").write_text("{")
    assert output_lock._holder(tmp_path / "lock") == "another process"


def test_a_folder_is_read_as_a_whole_while_nobody_writes_it(out, other_job):
    with (
        pytest.raises(BlockingIOError, match=f"`folder` is .*, which process {other_job.pid} on "),
        not_written(out, "folder"),
    ):
        pass
    other_job()
    with not_written(out, "folder"), only_writer(out):  # the same job may
        assert os.path.exists(f"{out}.lock")
    (out.parent / "file").touch()
    with not_written(out.parent / "file" / "below", "folder"):  # where no lock can be
        pass


def test_the_error_of_a_full_disk_names_the_output(out):
    class RustError(Exception):
        pass

    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(OSError, match="No space left on device: '.*out'") as error, only_writer(out):
        raise RustError(said)
    assert error.value.errno == errno.ENOSPC
    copied = OSError(errno.ENOSPC, "No space left on device", "code.py", None, "out.partial/code.py")
    for error in copied, OSError(errno.EIO, "Input/output error"), OSError(errno.EROFS, "Read-only file system"):
        with pytest.raises(OSError) as raised, only_writer(out):
            raise error
        assert str(raised.value) == f"[Errno {error.errno}] {error.strerror}: {str(out)!r}"
    with pytest.raises(FileNotFoundError, match="'a file'$"), only_writer(out):
        raise FileNotFoundError(errno.ENOENT, "No such file", "a file")
    with pytest.raises(RustError), only_writer(out):
        raise RustError("Error while deserializing header: invalid (os error 2)")


KILLED = "DataLoader worker (pid 7) is killed by signal: Killed. "
OF_WORKER = """Caught OSError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in share
RuntimeError: No space left

The above exception was the direct cause of the following exception:

OSError: there is no room: none"""


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError(KILLED), f"mmgem: {KILLED}Memory may have run out; the same command with --resume goes on"),
        (OSError(OF_WORKER), "mmgem: there is no room: none\n"),
    ],
    ids=["killed", "an error of its own"],
)
def test_what_ends_a_worker_is_said_in_a_line(error, said, monkeypatch, tmp_path):
    def train(*args, **kwargs):
        raise error

    monkeypatch.setattr("mmgem.training.recipes.run.train", train)
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 1 and result.stderr.startswith(said)
