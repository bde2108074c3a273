"""The campaign runs, finds nothing wrong, and would."""

import random

import pytest

from benchmarks import campaign, campaign_jobs


def test_each_corruption_changes_what_it_says():
    content, chance = bytes(range(1, 201)), random.Random(0)
    for kind in campaign.KINDS:
        for _ in range(20):
            changed = campaign.corrupt(content, kind, chance)
            if kind in ("cut", "longer"):
                assert len(changed) != len(content) and content.startswith(changed[: len(content)][:200])
            else:
                assert len(changed) == len(content) and changed != content
            if kind == "bit flip":
                [(before, after)] = [pair for pair in zip(content, changed, strict=True) if pair[0] != pair[1]]
                assert (before ^ after).bit_count() == 1


def test_moments_are_the_operations_on_files(tmp_path):
    def work():
        moments = campaign_jobs.Moments(3, campaign_jobs.fill_disk)
        (tmp_path / "a").write_text("1")
        (tmp_path / "a").read_text()
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "c").mkdir()
        counts = [moments.count]
        (tmp_path / "b").unlink()
        return counts

    error = {"error": "OSError", "message": "[Errno 28] No space left on device", "is_refusal": False}
    assert campaign_jobs.fork(work)() == (0, error)
    assert (tmp_path / "b").exists() and (tmp_path / "c").exists()
    assert campaign_jobs.fork(lambda: campaign_jobs.kill(None))() == (9, None)


def test_what_is_read_is_an_operation_where_the_disk_fails_at_reading(tmp_path):
    (tmp_path / "here").mkdir()
    for name in ("here/a", "b"):
        (tmp_path / name).write_text("1")

    def work():
        moments = campaign_jobs.Moments(2, campaign_jobs.fail_disk, tmp_path / "here")
        (tmp_path / "b").read_text()
        (tmp_path / "here" / "c").write_text("2")
        (tmp_path / "here" / "a").read_text()
        list((tmp_path / "here").iterdir())
        assert moments.count == 2
        (tmp_path / "here" / "a").read_text()

    error = {"error": "OSError", "message": "[Errno 5] Input/output error", "is_refusal": False}
    assert campaign_jobs.fork(work)() == (0, error)


@pytest.mark.slow
def test_nothing_goes_wrong(monkeypatch):
    small = {"IMAGES": 9, "BATCH_SIZE": 2, "ROWS_PER_PART": 4, "TIMEOUT": 900, "PHOTOGRAPHS": 1}
    for name, value in small.items():
        monkeypatch.setattr(campaign_jobs, name, value)
    monkeypatch.setattr(campaign, "DOUBLED", 2)

    def run() -> list:
        results = campaign.run(most=3, corruptions=30, seconds=0.2)
        return [results, campaign.report(results)]

    _, (results, table) = campaign_jobs.fork(run)()  # it replaces parts of mmgem
    assert len(results) == 4 * len(campaign.ACTS) + 3 * len(campaign.KINDS) + 5 + 7
    assert [what for what, _, outcomes in results if outcomes.get(campaign.WRONG)] == []
    lines = table.splitlines()
    assert len(lines) == len(results) + 2
    assert lines[2] == "| index: killed | 3 | as undisturbed 3, stopped 3 | 0 |"
