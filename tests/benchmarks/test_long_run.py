"""The long run: its recipe is one, jobs are watched until they end, and a growth of memory is seen."""

import subprocess
import sys

import pytest
import yaml

from benchmarks import long_run
from mmgem.training.recipes.recipe import load_recipe
from mmgem.training.recipes.validation import check_sections, check_stages


def test_the_gallery_is_what_the_recipe_trains_on(tmp_path):
    long_run.write_gallery(tmp_path / "images", 20)
    assert [len(list((tmp_path / "images" / str(number)).iterdir())) for number in range(long_run.FOLDERS)] == [2] * 10
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(long_run.recipe(tmp_path / "images", 5)))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    check_sections(recipe)
    check_stages(recipe)


def test_a_job_is_watched_until_it_ends_and_its_failure_is_told():
    holds = "import sys; held = b'x' * (2 << 25); print(flush=True); sys.stdin.read()"
    job = subprocess.Popen([sys.executable, "-S", "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    # After the first look it is waited for; after the second, which sees all that it holds, it may end.
    acts = iter([job.stdout.readline, job.stdin.close])

    def done():
        next(acts, lambda: None)()
        return 7

    *during, end = long_run.watch([job], done, every=0.05, after=100)
    assert max(sample["bytes"] for sample in during) > 2 << 25 and end["bytes"] == 0 < during[0]["bytes"]
    assert end["seconds"] > 100 and all(sample["done"] == 7 for sample in during)
    job = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="ended with an error"):
        list(long_run.watch([job], lambda: 0, every=0.05, after=0))


@pytest.mark.parametrize("growth", [0.0, 3.0])
def test_growth_is_that_of_the_second_half(growth):
    """MiB for each 1,000; the first half may fill what it likes."""
    memory = [2**20 * (100 + 50 * min(done, 5000) / 5000 + growth * done / 1000) for done in range(0, 10_001, 100)]
    samples = [{"seconds": n, "bytes": held, "done": 100 * n} for n, held in enumerate(memory)]
    samples.append({"seconds": 101, "bytes": 0, "done": 10_000})
    found = long_run.figures(samples)
    assert found["MiB per 1,000"] == pytest.approx(growth) and found["done"] == 10_000
    assert found["MiB at 25%"] == pytest.approx(125 + 2.5 * growth, rel=0.02)
    assert "| train | 10,000 | 1.7 |" in long_run.report({"train": samples})
