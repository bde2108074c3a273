"""Scenes as data: a torch dataset, and an image folder on disk, with the same rows."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from mmgem.training.data.folder_metadata import METADATA_NAME
from mmgem.training.data.sources import DatasetSource
from mmgem.training.output_lock import one_writer
from mmgem.training.progress import progress
from mmgem.training.scenes.captions import (
    write_captions,
    write_edit,
    write_hard_negatives,
    write_instructions,
    write_long_caption,
    write_qa,
    write_region_captions,
)
from mmgem.training.scenes.drawing import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE, Scene, draw_scene, make_scene, scene_boxes

if TYPE_CHECKING:
    from PIL import Image


def image_name(scene: Scene) -> str:
    """Returns the file name of a scene's picture: names sort as the scenes do."""
    return f"scene-{scene.seed}-{scene.index:07d}.png"


def twin_name(scene: Scene) -> str:
    """Returns the file name of the picture that follows from the scene's edit."""
    return f"scene-{scene.seed}-{scene.index:07d}-edited.png"


def _edit_field(scene: Scene) -> dict[str, str] | None:
    edit = write_edit(scene)
    return None if edit is None else {"instruction": edit.instruction, "file_name": twin_name(scene)}


def _draw_twin(scene: Scene, image_size: int) -> "Image.Image | None":
    edit = write_edit(scene)
    return None if edit is None else draw_scene(edit.twin, image_size)


_COLUMNS: dict[str, Callable[[Scene, int], Any]] = {
    "image": draw_scene,
    "file_name": lambda scene, size: image_name(scene),
    "scene_id": lambda scene, size: scene.scene_id,
    "captions": lambda scene, size: write_captions(scene),
    "long_caption": lambda scene, size: write_long_caption(scene),
    "boxes": scene_boxes,
    "region_captions": lambda scene, size: write_region_captions(scene),
    "label": lambda scene, size: scene.label,
    "qa": lambda scene, size: write_qa(scene),
    "hard_negatives": lambda scene, size: write_hard_negatives(scene),
    "edit": lambda scene, size: _edit_field(scene),
    "edited_image": _draw_twin,
    "instructions": lambda scene, size: write_instructions(scene),
}
COLUMNS = tuple(_COLUMNS)


class SceneDataset(Dataset):
    """Scenes of one seed as rows, each computed when it is asked for; nothing is stored.

    A row is a dict:

    | column | content |
    |---|---|
    | `image` | PIL image, RGB, `image_size` x `image_size` |
    | `file_name`, `scene_id` | the name of the image in a written folder; a stable id |
    | `captions` | 3 or 4 short captions, each true and complete |
    | `long_caption` | 105 to 130 words; what tells the scene apart stands in its last third |
    | `boxes`, `region_captions` | `[[x0, y0, x1, y1], ...]` in pixels, in reading order; one caption each |
    | `label` | color and shape of the large object |
    | `qa` | `[{"question": ..., "answer": ...}, ...]` |
    | `hard_negatives` | captions with exactly one attribute wrong |
    | `edit` | `{"instruction": ..., "file_name": ...}`, naming the picture of the twin; or None |
    | `edited_image` | the picture of the twin, as `image`; or None |
    | `instructions` | for each box `{"text": ..., "box": ...}`: words that mean the object in it and no other |

    Args:
        seed: The sequence of scenes. Training and evaluation take different seeds.
        count: Number of rows.
        image_size: Side of the images in pixels.
        unique: Whether to skip scenes whose objects, or whose twin's objects, another row or twin has already. Then
            every caption is true of one image only, twins included. Costs one pass over the scenes when created.
        columns: The columns of a row; what is left out is not computed.

    Raises:
        ValueError: If `count` is not positive, `image_size` too small, or a column unknown.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        image_size: int = 96,
        unique: bool = False,
        columns: Sequence[str] = COLUMNS,
    ):
        if count < 1:
            raise ValueError(f"`count` is {count}; expected 1 or more.")
        if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"`image_size` is {image_size}; expected {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels.")
        if unknown := set(columns) - set(COLUMNS):
            raise ValueError(f"`columns` holds {sorted(unknown)}; expected some of {', '.join(COLUMNS)}.")
        self.seed = seed
        self.image_size = image_size
        self.columns = tuple(columns)
        self._indices = _unique_indices(seed, count) if unique else range(count)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, row: int) -> dict[str, Any]:
        scene = self.scene(row)
        return {column: _COLUMNS[column](scene, self.image_size) for column in self.columns}

    def scene(self, row: int) -> Scene:
        """Returns the scene of a row.

        Raises:
            IndexError: If there is no such row; negative numbers count from the end.
        """
        return make_scene(self.seed, self._indices[row])


def open_scenes(scenes: SceneDataset, columns: Mapping[str, str | None] | None = None) -> DatasetSource:
    """Open the data section `scenes: {seed: ..., count: ...}`, the arguments of [`SceneDataset`]."""
    return DatasetSource(scenes, f"scenes-{scenes.seed}", columns)


def _unique_indices(seed: int, count: int) -> list[int]:
    """The first `count` indices of scenes that share their objects with no image before them."""
    seen: set[frozenset] = set()
    indices: list[int] = []
    index = 0
    while len(indices) < count:
        scene = make_scene(seed, index)
        edit = write_edit(scene)
        images = {frozenset(image.objects) for image in ([scene, edit.twin] if edit else [scene])}
        if seen.isdisjoint(images):
            seen |= images
            indices.append(index)
        index += 1
    return indices


@one_writer
def write_scene_folder(out: str | Path, seed: int, count: int, image_size: int = 96) -> Path:
    """Writes scenes as an ordinary image folder: PNG files, their edited twins, and `metadata.jsonl`.

    The rows are those of `SceneDataset(..., unique=True)`. The folder appears under its name only when it is complete;
    until then it is called `<out>.partial`, and an interrupted run is simply started again.

    `read_image_folder` gives the rows back. `datasets.load_dataset("imagefolder", data_dir=out)` reads them too and
    turns each `file_name` into an `image`, that of `edit` included; for its sake a scene without an edit is written
    with an `edit` of nulls.

    Args:
        out: The folder; it must not exist yet, or be empty.
        seed, count, image_size: As for `SceneDataset`.

    Returns:
        The path of the folder.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileExistsError: If `out` is a file or a folder with something in it.
        ValueError: If `count` or `image_size` are out of range.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"`out` is {str(out)!r}, which holds something; expected a new or empty folder.")
    scenes = SceneDataset(seed, count, image_size, unique=True)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with open(partial / METADATA_NAME, "w", encoding="utf-8") as metadata:
        for row in progress(range(count), desc=f"scenes to {out}", unit="scene"):
            fields = scenes[row]
            fields.pop("image").save(partial / fields["file_name"])
            twin = fields.pop("edited_image")
            if twin is not None:
                twin.save(partial / fields["edit"]["file_name"])
            else:
                # imagefolder fails on a plain null where other rows have an object with a `file_name`.
                fields["edit"] = {"instruction": None, "file_name": None}
            metadata.write(json.dumps(fields) + "\n")
    if out.exists():
        out.rmdir()
    return partial.rename(out)
