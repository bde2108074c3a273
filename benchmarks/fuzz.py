"""Random bytes, grown by what they reach (atheris), into whatever reads files of others.

    pip install atheris    # wheels for CPython 3.11 to 3.13 on Linux
    python -m benchmarks.fuzz --target pictures --seconds 60

Each target takes the bytes as a file and may refuse it with a `ValueError` or an `OSError`; anything else is a
finding, which atheris prints with its input and leaves in the current folder as `crash-...`.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mmgem.processing", "mmgem.training"]):
    from mmgem.processing.boxes import check_boxes
    from mmgem.processing.image_loading import open_picture
    from mmgem.training.data.folder_metadata import read_metadata
    from mmgem.training.recipes.recipe import load_recipe
    from mmgem.training.search.storage import read_index, verify_index

from PIL import Image

REFUSALS = (ValueError, OSError)


def pictures(data: bytes, folder: Path) -> None:
    open_picture(data, "picture", 1 << 20, 32).decode()


def boxes(data: bytes, folder: Path) -> None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return
    check_boxes(value, [(60, 40)])


def metadata(data: bytes, folder: Path) -> None:
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).write_bytes(data)
        try:
            list(read_metadata(folder / name))
        except REFUSALS:
            continue


def recipes(data: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(data)
    load_recipe(folder / "recipe.yaml")


def manifests(data: bytes, folder: Path) -> None:
    (folder / "search_index.json").write_bytes(data)
    read_index(folder, "path")
    verify_index(folder)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    own.__name__: own for own in (pictures, boxes, metadata, recipes, manifests)
}


def seeds(target: str) -> list[bytes]:
    """Some files that are read, to begin with."""
    if target == "pictures":
        files = []
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"):
            Image.new("RGB", (8, 6), "red").save(buffer := BytesIO(), kind)
            files.append(buffer.getvalue())
        return files
    return {
        "boxes": [b"[[[0, 0, 9, 9]]]"],
        "metadata": [b'{"file_name": "a.png", "text": "a"}', b'file_name,text\na.png,"[""a""]"'],
        "recipes": [b"model: {pretrained: a}\nstages: [{name: a, train_data: {folder: a}, training: {max_steps: 1}}]"],
        "manifests": [b'{"format": 3, "facts": {}, "files": {}}'],
    }[target]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    with tempfile.TemporaryDirectory() as name:
        folder, corpus = Path(name) / "work", Path(name) / "corpus"
        folder.mkdir()
        corpus.mkdir()
        for number, seed in enumerate(seeds(arguments.target)):
            (corpus / str(number)).write_bytes(seed)

        def attempt(data: bytes) -> None:
            try:
                target(data, folder)
            except REFUSALS:
                pass

        limits = [f"-max_total_time={arguments.seconds}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], str(corpus), *limits, "-print_final_stats=1"], attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
