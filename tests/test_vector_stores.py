"""The page `docs/vector_stores.md`: each recipe finds what the cosines find, where its store is installed."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch

from mmgem.training.scenes.dataset import write_scene_folder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "vector_stores.md").read_text()
BEGINNING, *RECIPES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAMES = re.findall(r"## (.*?)\n(?:(?!\n## ).)*?```python", PAGE.partition("```\n")[2], re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the code at the beginning of the page has defined, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("stores")
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    write_scene_folder(folder / "gallery", 7, 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found: dict = {}
        exec(compile(BEGINNING, "vector_stores.md", "exec"), found)
    return folder, found


@pytest.mark.slow
@pytest.mark.pages
@pytest.mark.parametrize("code", RECIPES, ids=NAMES)
def test_a_recipe_finds_the_nearest_images(page, code, monkeypatch):
    for module in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    folder, defined = page
    monkeypatch.chdir(folder)
    shutil.rmtree("gallery.lance", ignore_errors=True)
    defined = dict(defined)
    exec(compile(code, "vector_stores.md", "exec"), defined)
    if "asked" in defined:
        asked = torch.as_tensor(defined["asked"])
        scores = [float((asked @ torch.as_tensor(vectors).T).amax(1).sum()) for vectors in defined["several"]]
    else:
        scores = (defined["images"] @ defined["query"][0]).tolist()
    best = sorted(range(24), key=lambda row: -scores[row])[:3]
    assert defined["found"] == [defined["paths"][row] for row in best]
