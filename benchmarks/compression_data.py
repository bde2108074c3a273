"""Data of the compression experiment: scenes drawn, tokenized and seen by the frozen vision tower once, off the clock.
All runs of a seed read the same batches in the same order; all runs of all seeds are measured on the same held-out
scenes.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.experiment_data import save_whole
from benchmarks.peers import Batch
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.inference import inference
from mmgem.training.loading import load_checkpoint
from mmgem.training.scenes.dataset import SceneDataset

HELD_OUT_SEED, TRAINING_SEED = 6_000_000, 6_000_001  # the seed of the run is added to the second
ENDLESS = 10**9
COLUMNS = ("image", "scene_id", "captions", "qa")
_NOTHING = {"captions_per_image": 0, "regions_per_image": 0, "questions_per_image": 0, "long_caption_probability": 0.0}


@dataclass(frozen=True)
class Stage:
    """One of the two stages.

    Args:
        batch_size: Images of a step.
        learning_rate: The peak, after a tenth of the steps; from there a cosine to zero.
        options: The options of `MMGEMCollator`, which say what is drawn from each image.
    """

    batch_size: int
    learning_rate: float
    options: dict[str, int]


@dataclass(frozen=True)
class Setting:
    """A size of the experiment.

    Args:
        checkpoint: That all runs start from; with a single [EMB] vector, which has not learned to read images.
        vectors: Numbers of [EMB] vectors, k.
        seeds: How many; each has its own scenes, order and new vectors.
        pairs: Numbers of contrastive pairs that match runs see, beside none, each with a schedule of its own.
        compress_images: That the compress stage sees, before any pair.
        held_out: Scenes to measure on.
        max_objects: Scenes with more are left out, in training and evaluation.
        compress, match: The stages.
    """

    checkpoint: str
    vectors: tuple[int, ...] = (1, 4, 16, 32)
    seeds: int = 3
    pairs: tuple[int, ...] = (512, 1024, 2048)
    compress_images: int = 4096
    held_out: int = 300
    max_objects: int = 2
    compress: Stage = field(
        default_factory=lambda: Stage(16, 5e-4, {"memory_captions_per_image": 1, "memory_questions_per_image": 2})
    )
    match: Stage = field(default_factory=lambda: Stage(32, 5e-4, {"match_captions_per_image": 1}))

    def __post_init__(self):
        sizes = {"pairs": (self.pairs, self.match), "compress_images": ((self.compress_images,), self.compress)}
        for name, (numbers, stage) in sizes.items():
            if wrong := [number for number in numbers if number < 1 or number % stage.batch_size]:
                raise ValueError(f"`{name}` has {wrong[0]}; expected multiples of the batch size {stage.batch_size}.")

    def as_dict(self) -> dict:
        """What JSON makes of it."""
        return json.loads(json.dumps(asdict(self)))


class GridModel(MMGEMModel):
    """The model after its vision tower: wherever it takes `pixel_values`, it takes the patch grid that the frozen
    tower made of them, (B, C, rows, columns).
    """

    def _patch_grid(self, pixel_values: torch.Tensor, spatial_shapes: None = None) -> torch.Tensor:
        return pixel_values.float()


@dataclass(frozen=True)
class HeldOut:
    """Scenes that no run is trained on, no two of them alike.

    Args:
        grids: (I, C, rows, columns), half precision.
        captions: Of each scene, all its short ones.
    """

    grids: torch.Tensor = field(repr=False)
    captions: list[list[str]]


def prepare_held_out(setting: Setting, path: Path) -> HeldOut:
    """From `path`, or drawn and written there."""
    if not path.is_file():
        model, processor = load_checkpoint(setting.checkpoint, "cpu")
        scenes = SceneDataset(HELD_OUT_SEED, ENDLESS, columns=("image", "captions"))
        rows = [scenes[number] for number, _ in _held_out(setting)]
        parts = [rows[start : start + 64] for start in range(0, len(rows), 64)]
        images = (processor(images=[row["image"] for row in part], return_tensors="pt") for part in parts)
        grids = [_grids(model, inputs["pixel_values"]) for inputs in tqdm(images, "held-out scenes", len(parts))]
        save_whole({"grids": torch.cat(grids), "captions": [row["captions"] for row in rows]}, path)
    return HeldOut(**torch.load(path, mmap=True))


def prepare_batches(setting: Setting, seed: int, path: Path, position: int = 0) -> dict[str, list[Batch]]:
    """The training batches of a seed, for `GridModel`, from `path` or drawn and written there; `position` is the line
    of the progress bar.

    Returns:
        Those of the stages `compress` and `match`, of different scenes.
    """
    if not path.is_file():
        model, processor = load_checkpoint(setting.checkpoint, "cpu")
        torch.manual_seed(seed)
        rows = _training_rows(setting, seed)
        stages = {
            "compress": (setting.compress, setting.compress_images),
            "match": (setting.match, max(setting.pairs)),
        }
        batches: dict[str, list[Batch]] = {name: [] for name in stages}
        total = sum(images // stage.batch_size for stage, images in stages.values())
        with tqdm(
            total=total, desc=f"scenes of seed {seed}", unit="batch", leave=False, position=position
        ) as progress:
            for name, (stage, images) in stages.items():
                collate = MMGEMCollator(processor, **_NOTHING | stage.options)
                for _ in range(images // stage.batch_size):
                    batch = collate(list(islice(rows, stage.batch_size)))
                    del batch["return_loss"]
                    batches[name].append(batch | {"pixel_values": _grids(model, batch["pixel_values"])})
                    progress.update()
        save_whole(batches, path)
    return torch.load(path, mmap=True)


def _grids(model: MMGEMModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the vision tower makes of (B, 3, H, W): (B, C, rows, columns), half precision, which is half the file."""
    with inference(model):
        return model._patch_grid(pixel_values).half()


def _training_rows(setting: Setting, seed: int) -> Iterator[dict]:
    held_out = {objects for _, objects in _held_out(setting)}
    scenes = SceneDataset(TRAINING_SEED + seed, ENDLESS, columns=COLUMNS)
    return (scenes[number] for number, objects in _fitting(setting, scenes) if objects not in held_out)


def _held_out(setting: Setting) -> list[tuple[int, frozenset]]:
    """Number and objects of each held-out scene."""
    numbers: dict[frozenset, int] = {}
    fitting = _fitting(setting, SceneDataset(HELD_OUT_SEED, ENDLESS))
    while len(numbers) < setting.held_out:
        number, objects = next(fitting)
        numbers.setdefault(objects, number)
    return [(number, objects) for objects, number in numbers.items()]


def _fitting(setting: Setting, scenes: SceneDataset) -> Iterator[tuple[int, frozenset]]:
    """Number and objects of the scenes that take part."""
    for number in count():
        objects = frozenset(scenes.scene(number).objects)
        if len(objects) <= setting.max_objects:
            yield number, objects
