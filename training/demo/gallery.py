"""The gallery of a demonstration: scenes of a seed that no recipe trains on, as files, with their ground truth."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgem.training.data.image_folder import ImageFolderDataset, read_image_folder
from mmgem.training.scenes.captions import write_edit
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.scenes.drawing import Scene
from mmgem.training.search.row_search import Hit

SEED = 7_000_000
HITS = 5  # answers of a search that are shown


@dataclass
class Gallery:
    """The gallery with its ground truth.

    Args:
        dataset: The rows of the image folder.
        scenes: The scene of each image file, twins included.
    """

    dataset: ImageFolderDataset
    scenes: dict[str, Scene]

    @classmethod
    def read(cls, folder: Path, count: int) -> "Gallery":
        """Reads a gallery of `count` scenes of `SEED` from the folder where they were written."""
        dataset = read_image_folder(folder)
        known = SceneDataset(SEED, count, unique=True)
        scenes = {}
        for number, row in enumerate(dataset.rows):
            scene = known.scene(number)
            scenes[row["file_name"]] = scene
            if edit := write_edit(scene):
                scenes[row["edit"]["file_name"]] = edit.twin
        return cls(dataset, scenes)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metadata of every scene, without its image."""
        return self.dataset.rows

    @property
    def crowded(self) -> list[dict[str, Any]]:
        """The rows of three objects or more."""
        return [row for row in self.rows if len(row["boxes"]) >= 3]

    @property
    def edited(self) -> list[dict[str, Any]]:
        """The crowded rows that have a twin.

        Where there is one object and it is edited, images with that object are as near as the twin.
        """
        return [row for row in self.crowded if row["edit"]]

    @property
    def file_names(self) -> list[str]:
        """The image files of the scenes, without the twins."""
        return [row["file_name"] for row in self.rows]


def show_hits(hits: Iterable[Hit], right: Collection[str]) -> list[dict[str, Any]]:
    """Hits as the page has them; `right` are the files that should be found."""
    names = [(hit.path.name, hit.score) for hit in hits]
    return [{"file_name": name, "score": score, "right": name in right} for name, score in names]
