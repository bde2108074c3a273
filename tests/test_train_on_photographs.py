"""The recipes of docs/train_on_photographs.md are recipes."""

import re
from pathlib import Path

import yaml

from mmgem.training.recipes.recipe import load_recipe, parse_recipe
from mmgem.training.recipes.validation import check_sections

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "train_on_photographs.md").read_text(encoding="utf-8")


def test_what_the_page_shows_can_be_trained():
    whole, *others = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL))
    for sections in (whole, *(whole | other for other in others)):
        check_sections(parse_recipe(sections))


def test_the_page_shows_the_data_of_the_recipe_of_mmgem_photo():
    recipe = load_recipe(ROOT / "model_cards" / "mmgem-photo" / "recipe.yaml")
    check_sections(recipe)
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[0])["stages"][0]["train_data"]
    assert shown == list(recipe.stages[0].train_data)
