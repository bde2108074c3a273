import pytest

from mmgem.training import progress as module
from mmgem.training.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock to set, in a list."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setitem(module.shown, "as", None)  # whatever a command before has set
    return now


def test_where_nobody_sees_a_bar_a_line_a_minute_is_written(clock, capsys):
    with progress(total=5000, initial=1000, desc="images", unit="image") as bar:
        for _ in range(4):
            clock[0] += 40
            bar.update(400)
    assert capsys.readouterr().err.splitlines() == [
        "images: 1,800 of 5,000, 10 a second, 5 minutes left",
        "images: 2,600 of 5,000, 10 a second, 4 minutes left",
    ]


def test_what_is_iterated_over_is_counted(clock, capsys):
    for _ in progress(iter(range(3)), desc="texts", unit="text"):
        clock[0] += 61
    assert capsys.readouterr().err.splitlines()[-1] == "texts: 3, 0.0164 a second"
    assert list(progress([4, 5], desc="rows")) == [4, 5]
    assert capsys.readouterr().err == ""  # in less than a minute


def test_quiet_is_quiet(clock, capsys, monkeypatch):
    monkeypatch.setitem(module.shown, "as", "nothing")
    with progress(total=2, desc="images") as bar:
        clock[0] += 100
        bar.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("style", ["bar", "lines"])
def test_of_a_distributed_run_the_first_process_alone_says_how_far_it_is(clock, capsys, monkeypatch, style):
    monkeypatch.setitem(module.shown, "as", style)
    for rank, is_told in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        for _ in progress([1, 2], desc="images"):
            clock[0] += 61
        assert ("images" in capsys.readouterr().err) == is_told


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setitem(module.shown, "as", "bar")
    with progress(total=2, desc="images", disable=True) as bar:
        assert type(bar).__module__.startswith("tqdm")
