"""Data of the experiment: scenes drawn and tokenized once, off the clock. All runs of a seed read the same batches in
the same order; all runs of all seeds are measured on the same held-out scenes.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SiglipImageProcessorPil

from benchmarks.peers import Batch, TowerSizes
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.recipes.tokenizer import train_tokenizer
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.scenes.drawing import Scene, make_scene

HELD_OUT_SEED = 2_000_000
TRAINING_SEED = 1_000  # plus the seed of the run
TOKENIZER_SCENES = 2_000
ENDLESS = 10**9
COLUMNS = ("image", "scene_id", "captions", "long_caption")


@dataclass(frozen=True)
class Setting:
    """A size of the experiment.

    Args:
        towers: Of all contestants.
        max_objects, shapes, fills: Scenes with more objects, or others, are left out, in training and evaluation.
        steps: Optimizer steps of a run; batch_size: images of a step, each with one short caption.
        long_share: Share of the images whose long caption is embedded too.
        learning_rate: Peak, after `warmup` steps; from there a cosine to zero.
        held_out: Scenes to measure on.
        max_new_tokens: At which a generated caption is cut.
    """

    towers: TowerSizes
    max_objects: int
    shapes: tuple[str, ...]
    fills: tuple[str, ...]
    steps: int
    batch_size: int
    long_share: float
    held_out: int
    learning_rate: float = 1e-3
    warmup: int = 50
    max_new_tokens: int = 40

    def as_dict(self) -> dict:
        """What JSON makes of it."""
        return json.loads(json.dumps(asdict(self)))

    def fits(self, scene: Scene) -> bool:
        """Whether the scene takes part."""
        return len(scene.objects) <= self.max_objects and all(
            item.shape in self.shapes and item.fill in self.fills for item in scene.objects
        )


@dataclass(frozen=True)
class HeldOut:
    """Scenes that no run is trained on.

    Args:
        batch: All of them, each with one caption.
        captions: Of each scene, all its short ones; long_captions: of each scene.
    """

    batch: Batch = field(repr=False)
    captions: list[list[str]]
    long_captions: list[str]


def prepare_tokenizer(setting: Setting, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of all contestants, learned from short and long captions of training scenes, kept in `folder`."""
    if not folder.is_dir():
        scenes = SceneDataset(TRAINING_SEED, TOKENIZER_SCENES, columns=("captions", "long_caption"))
        rows = [scenes[number] for number in range(len(scenes))]
        texts = [text for row in rows for text in (*row["captions"], row["long_caption"])]
        tokenizer = train_tokenizer(texts, setting.towers.vocabulary, setting.towers.max_text_length - 1)
        tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def prepare_held_out(setting: Setting, tokenizer: PreTrainedTokenizerBase, path: Path) -> HeldOut:
    """The held-out scenes, from `path` or drawn and written there. No two of them share their objects."""
    if not path.is_file():
        scenes = SceneDataset(HELD_OUT_SEED, ENDLESS, setting.towers.image_size, columns=COLUMNS)
        rows = [scenes[number] for number, _ in _held_out(setting)]
        collate = _collator(setting, tokenizer, long_share=0.0)
        torch.manual_seed(0)
        held_out = {
            "batch": _as_bytes(collate(rows)),
            "captions": [row["captions"] for row in rows],
            "long_captions": [row["long_caption"] for row in rows],
        }
        save_whole(held_out, path)
    held_out = torch.load(path)
    return HeldOut(**held_out | {"batch": to_pixels(held_out["batch"])})


def prepare_batches(setting: Setting, tokenizer: PreTrainedTokenizerBase, seed: int, path: Path) -> list[Batch]:
    """The training batches of a seed, pixels as bytes (see `to_pixels`), from `path` or drawn and written there."""
    if not path.is_file():
        held_out = {objects for _, objects in _held_out(setting)}
        scenes = SceneDataset(TRAINING_SEED + seed, ENDLESS, setting.towers.image_size, columns=COLUMNS)
        collate = _collator(setting, tokenizer, setting.long_share)
        fitting = _rows_that_fit(setting, TRAINING_SEED + seed)
        rows = (number for number, objects in fitting if objects not in held_out)
        torch.manual_seed(seed)
        batches = [
            _as_bytes(collate([scenes[number] for number in islice(rows, setting.batch_size)]))
            for _ in tqdm(range(setting.steps), desc=f"draw the scenes of seed {seed}", unit="batch")
        ]
        save_whole(batches, path)
    return torch.load(path, mmap=True)


def to_pixels(batch: Batch) -> Batch:
    """The batch with pixels in [-1, 1] instead of bytes; pixels that are no bytes stay."""
    if "pixel_values" not in batch or batch["pixel_values"].dtype != torch.uint8:
        return batch
    return batch | {"pixel_values": batch["pixel_values"].float() / 127.5 - 1}


def _as_bytes(batch: Batch) -> Batch:
    del batch["return_loss"]
    return batch | {"pixel_values": ((batch["pixel_values"] + 1) * 127.5).round().to(torch.uint8)}


def save_whole(content: object, path: Path) -> None:
    """Saves with torch; under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)


def _rows_that_fit(setting: Setting, seed: int) -> Iterator[tuple[int, frozenset]]:
    """The scenes of a seed that take part: number and objects."""
    for number in count():
        scene = make_scene(seed, number)
        if setting.fits(scene):
            yield number, frozenset(scene.objects)


def _held_out(setting: Setting) -> list[tuple[int, frozenset]]:
    """The scenes to measure on, no two of which share their objects: number and objects."""
    numbers: dict[frozenset, int] = {}
    rows = _rows_that_fit(setting, HELD_OUT_SEED)
    while len(numbers) < setting.held_out:
        number, objects = next(rows)
        numbers.setdefault(objects, number)
    return [(number, objects) for objects, number in numbers.items()]


def _collator(setting: Setting, tokenizer: PreTrainedTokenizerBase, long_share: float) -> MMGEMCollator:
    size = setting.towers.image_size
    processor = MMGEMProcessor(
        # To [-1, 1], for every vision tower of the experiment.
        SiglipImageProcessorPil(size={"height": size, "width": size}),
        tokenizer,
        num_visual_tokens=16,  # of prompts, of which a batch has none
    )
    return MMGEMCollator(processor, regions_per_image=0, questions_per_image=0, long_caption_probability=long_share)
