"""The benchmark of prompts and rationales, on mmgem-tiny and few scenes."""

from pathlib import Path

import pytest

from benchmarks import reading_modes
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset

TINY = Path(__file__).parents[2] / "model_cards" / "mmgem-tiny"


@pytest.fixture
def rows():
    dataset = SceneDataset(1, 8, unique=True, columns=reading_modes.COLUMNS)
    return [dataset[row] for row in range(8)]


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: rest for first, *rest in lines}


@pytest.mark.slow
def test_a_prompt_finds_more_than_chance_and_less_than_training(rows):
    table = cells(reading_modes.compare_prompts(*load_checkpoint(TINY), rows, prompts=["a picture of"]))
    (chance,), (trained,), (prompted,) = table["chance"], table["[EMB], trained"], table['"a picture of"']
    assert float(chance) == 0.125 < float(prompted) <= float(trained) > 0.8


@pytest.mark.slow
def test_rationales_are_counted(rows):
    table = cells(reading_modes.compare_rationales(*load_checkpoint(TINY), rows, numbers=[0, 2]))
    assert list(table) == ["0", "2"]
    assert all(0 < float(value) <= 1 for value in table["0"])
