"""A search index of a folder of images is made, or brought up to date."""

from collections import Counter
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from mmgem.processing.image_loading import MAX_PIXELS
from mmgem.training.data.image_files import (
    FoundImages,
    ImageFile,
    ImageReader,
    Skipped,
    apply_to_batch,
    find_images,
    shorter_side_for,
)
from mmgem.training.inference import embed_and_remember, embed_images
from mmgem.training.output_lock import one_writer
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.merging import (
    Place,
    common_bound,
    current_rows,
    finished_run,
    merge,
    rows_by_content,
    runs_of_parts,
)
from mmgem.training.search.settings import IndexSettings, Precision
from mmgem.training.search.storage import (
    UNFINISHED,
    IndexFacts,
    StoredIndex,
    is_free,
    is_index,
    next_part,
    read_index,
    remove_parts,
    write_index,
    write_part,
)

ROWS_PER_PART = 256  # what a killed run loses at most


class IndexReport(NamedTuple):
    """Report of `build_index`.

    Args:
        images: Images in the index.
        embedded: How many of them it had to embed.
        skipped: The files it left out, and folders it could not look into.
        bytes_per_image: Bytes that the vectors and the memory of one image take.
        passed_over: How many files and links there are that are not read, by kind, see `FoundImages`.
    """

    images: int
    embedded: int
    skipped: list[Skipped]
    bytes_per_image: int
    passed_over: dict[str, int]


@one_writer
def build_index(
    folder: str | Path,
    model,
    processor,
    out: str | Path,
    batch_size: int = 32,
    vectors: int | None = None,
    dimensions: int | None = None,
    precision: Precision = "float32",
    memory: int | bool = False,
    moved: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> IndexReport:
    """Embeds every image below a folder into an index, or brings an index up to date.

    An image is not embedded again whose file has the size and time it had, or whose content a file had, whatever it
    was called; whether the earlier run finished or was killed. Rows of files that are gone are dropped. Rows of files
    that cannot be seen are kept: those in a folder that cannot be listed, or is empty, as that of a disk that is away.
    Files that cannot be read are left out. All of this is reported.

    Args:
        folder: Where the images are, at any depth.
        model: An `MMGEMModel`.
        processor: Its `MMGEMProcessor`.
        out: The folder of the index: a new or empty one, or an index of the same folder by the same model.
        batch_size: Images at a time.
        vectors: Of a model with several vectors per image, how many of the first ones are kept; by default all.
        dimensions: How many of the first values of each vector are kept; by default all.
        precision: `"float32"`, `"int8"` or `"binary"`, see `VectorCodec`.
        memory: Whether to keep what `mmgem ask` needs, the states of the k [EMB] vectors after each image; a number
            keeps the first of them.
        moved: Whether `out` may be the index of another folder, from which the images have moved to this one.
        max_pixels: The most pixels of an image that is read.

    Returns:
        How many images there are, and were embedded, and what was left out.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileNotFoundError: If `folder` is not there.
        ValueError: If there is no image below it that can be read, if the model does not give what is asked for, or
            if `out` is something else already, such as an index with other settings.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; expected 1 or more.")
    found = find_images(folder)
    folder, out = Path(folder).resolve(), Path(out).resolve()
    settings = IndexSettings.settle(model, vectors, dimensions, precision, memory)
    kinds = ["weights", *model.config.embedded_kinds, *([] if settings.memory is None else ["memory"])]
    name = model.name_or_path
    facts = IndexFacts(
        folder=str(folder),
        model=str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        settings=settings,
        fingerprint=Fingerprint.take(model, processor, kinds),
    )
    unfinished = out / UNFINISHED
    stored = None if is_free(out) else _read_same(out, facts, moved)
    begun = _read_same(unfinished, facts, moved) if is_index(unfinished) else None
    if begun is None:
        remove_parts(unfinished)  # what a run left that was killed while it did so itself
    if known := stored or begun:  # what an index is known by stays, however many models pass for the first
        facts = replace(facts, fingerprint=known.facts.fingerprint)
    write_index(unfinished, facts, begun.version + 1 if begun else 1)

    finished = finished_run(stored)
    runs = finished + runs_of_parts(unfinished, facts)
    places, by_content = current_rows(runs, found), rows_by_content(runs)
    todo = [file_name for file_name in found.versions if file_name not in places]
    skipped: list[Skipped] = []
    reader = ImageReader(folder, shorter_side_for(processor), max_pixels, by_content)
    _embed_files(reader, todo, found, model, processor, unfinished, batch_size, settings, skipped)
    runs = finished + runs_of_parts(unfinished, facts)
    rows = current_rows(runs, found)
    embedded = len(rows) - len(places)
    for file_name, content in reader.recognized.items():
        rows[file_name] = by_content[content]._replace(version=found.versions[file_name])
    skipped = _unseen(found, rows) + skipped
    if not rows:
        remove_parts(unfinished)
        if not any(out.iterdir()):
            out.rmdir()
        raise ValueError(
            f"`folder` is {str(folder)!r}, where no image can be read, such as {skipped[0].file_name!r}: "
            f"{skipped[0].reason}"
        )
    rows = dict(sorted(rows.items()))
    if not _is_current(stored, facts, rows):
        if settings.precision == "int8":
            facts = replace(facts, bound=common_bound(runs))
        write_index(out, facts, stored.version + 1 if stored else 1, len(rows), merge(runs, rows, facts.codec))
    remove_parts(unfinished)
    return IndexReport(len(rows), embedded, skipped, read_index(out, "out").bytes_per_row, found.passed_over)


def _read_same(place: Path, facts: IndexFacts, moved: bool) -> StoredIndex:
    """Reads an index with the same settings and folder by the same model.

    Raises:
        ValueError: If there is anything else.
    """
    stored = read_index(place, "out")
    there = stored.facts
    another = "Choose another place, or delete it."
    if there.folder != facts.folder and not moved:
        raise ValueError(
            f"`out` is {str(place)!r}, an index of the folder {there.folder!r}; expected one of {facts.folder!r}. "
            f"{another} If the images have moved from there, say so (`--moved`)."
        )
    if difference := there.fingerprint.difference(facts.fingerprint):
        raise ValueError(
            f"`out` is {str(place)!r}, an index by the model {there.model!r} as it was then; now it is "
            f"{facts.model!r}, {difference}. {another}"
        )
    for name in IndexSettings.__dataclass_fields__:
        kept, asked = getattr(there.settings, name), getattr(facts.settings, name)
        if kept != asked:
            raise ValueError(
                f"`out` is {str(place)!r}, an index with {name} {kept}; expected {asked}, as is asked for now. "
                f"{another}"
            )
    return stored


def _is_current(stored: StoredIndex | None, facts: IndexFacts, rows: dict[str, Place]) -> bool:
    """Whether the index that is there has these rows, and no others, of the same folder."""
    if stored is None or stored.rows is None or stored.version == 0:
        return False
    if (stored.facts.folder, stored.facts.model) != (facts.folder, facts.model):
        return False
    versions = zip(stored.rows["file_name"], stored.rows["version"], strict=True)
    return rows == {name: Place(0, row, version) for row, (name, version) in enumerate(versions)}


def _unseen(found: FoundImages, rows: dict[str, Place]) -> list[Skipped]:
    """What cannot be seen, and what is kept of it."""
    kept = Counter(found.hiding_place(name) for name in rows if name not in found.versions)
    report = []
    for place in sorted({*found.unseen, *filter(None, kept)}):
        reason = found.unseen.get(place, "it is empty, as if its disk were away")
        if kept[place]:
            reason += f"; what the index has of it, {kept[place]} images, is kept until it is gone"
        report.append(Skipped(place, reason))
    return report


def _embed_files(
    reader: ImageReader,
    file_names: list[str],
    found: FoundImages,
    model,
    processor,
    place: Path,
    batch_size: int,
    settings: IndexSettings,
    skipped: list[Skipped],
) -> None:
    """Embeds files into parts, each of which is there as a whole or not at all."""
    rows: list[dict[str, Any]] = []
    part_numbers = count(next_part(place))

    def write_rows() -> None:
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        columns |= {name: np.stack(columns[name]) for name in ("embedding", "memory") if name in columns}
        write_part(place, next(part_numbers), columns)
        rows.clear()

    def embed(files: list[ImageFile]) -> list[dict[str, np.ndarray]]:
        images = [file.image for file in files]
        columns = {}
        if settings.memory is None:
            embeds = embed_images(model, processor, images)
        else:
            embeds, _, memory = embed_and_remember(model, processor, images)
            columns["memory"] = _to_half(memory[:, : settings.memory])
        columns["embedding"] = _check_unit(settings.shorten(embeds)).numpy()
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    images = len(found.versions)
    with tqdm(total=images, initial=images - len(file_names), desc="images", unit="image") as progress:
        try:
            for batch in reader.read_batches(file_names, batch_size, skipped):
                for file, arrays in apply_to_batch(embed, batch, skipped):
                    facts = {"file_name": file.file_name, "width": file.size[0], "height": file.size[1]}
                    facts |= {"content": file.content, "version": found.versions[file.file_name]}
                    rows.append(facts | arrays)
                progress.update(len(batch))
                if len(rows) >= ROWS_PER_PART:
                    write_rows()
        finally:  # also of a run that is interrupted
            if rows:
                write_rows()


def _check_unit(embeddings: torch.Tensor) -> torch.Tensor:
    """Raises a ValueError for vectors that no query has a cosine with."""
    if not embeddings.isfinite().all():
        raise ValueError("`embedding` holds values that are NaN or infinite; expected finite ones.")
    if (embeddings.norm(dim=-1) < 0.5).any():
        raise ValueError("`embedding` is a vector of zeros; expected one with a direction.")
    return embeddings


def _to_half(memory: torch.Tensor) -> np.ndarray:
    """Raises a ValueError for what float16 cannot hold."""
    half = memory.half()
    if not half.isfinite().all():
        raise ValueError(f"`memory` holds values up to {memory.abs().max():.3g}; expected at most 65504.")
    return half.numpy()
