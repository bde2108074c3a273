"""A search index of a folder of images is made, or brought up to date."""

import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from mmgem.training.data.image_files import ImageFile, Skipped, apply_to_batch, find_images, read_batches
from mmgem.training.inference import embed_and_remember, embed_images
from mmgem.training.output_lock import one_writer
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.merging import EarlierRun, Place, common_bound, current_rows, merge, read_earlier_runs
from mmgem.training.search.settings import IndexSettings, Precision
from mmgem.training.search.storage import (
    BEFORE_FACTS,
    FACTS_FILE,
    PROBES_FILE,
    ROWS_FILE,
    WRITING,
    ArrayColumn,
    IndexFacts,
    is_index,
    partial_place,
    read_rows,
    write_rows,
)

ROWS_PER_PART = 256  # what a killed run loses at most


class IndexReport(NamedTuple):
    """Report of `build_index`.

    Args:
        images: Images in the index.
        embedded: How many of them it had to embed.
        skipped: The files it left out.
        bytes_per_image: Bytes that the vectors and the memory of one image take.
    """

    images: int
    embedded: int
    skipped: list[Skipped]
    bytes_per_image: int


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
) -> IndexReport:
    """Embeds every image below a folder into an index, or brings an index up to date.

    An image whose file has the size and time it had is not embedded again, whether the earlier run finished or was
    killed; rows of files that are gone are dropped. Files that cannot be read are left out and reported.

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
    folder, out = Path(folder).resolve(), Path(out).resolve()
    partial = partial_place(out)
    file_names = find_images(folder)
    settings = IndexSettings.settle(model, vectors, dimensions, precision, memory)
    kinds = ["weights", *model.config.embedded_kinds, *([] if settings.memory is None else ["memory"])]
    name = model.name_or_path
    facts = IndexFacts(
        folder=str(folder),
        model=str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        settings=settings,
        fingerprint=Fingerprint.take(model, processor, kinds),
    )
    if not out.exists() and is_index(partial / WRITING):  # killed just before the last step
        (partial / WRITING).rename(out)
    earlier = [there for place in (out, partial) if (there := _read_place(place, facts))]
    if earlier:  # what an index is known by stays, however many models pass for the first
        facts = replace(facts, fingerprint=earlier[0].fingerprint)
    partial.mkdir(parents=True, exist_ok=True)
    facts.write(partial)

    versions = {file_name: _version(folder / file_name) for file_name in file_names}
    done = current_rows(read_earlier_runs(out, partial, facts), versions)
    todo = [file_name for file_name in file_names if file_name not in done]
    skipped = _embed_files(folder, todo, versions, model, processor, partial, batch_size, settings)

    runs = read_earlier_runs(out, partial, facts)
    rows = current_rows(runs, versions)
    if not rows:
        _remove(partial)
        first = skipped[0]
        raise ValueError(
            f"`folder` is {str(folder)!r}, where no image can be read, such as {first.file_name!r}: {first.reason}"
        )
    _write_index(runs, [rows[file_name] for file_name in sorted(rows)], facts, partial, out)
    _remove(partial)
    return IndexReport(len(rows), len(rows) - len(done), skipped, _bytes_per_image(read_rows(out / ROWS_FILE)))


def _write_index(runs: list[EarlierRun], places: list[Place], facts: IndexFacts, partial: Path, out: Path):
    """The whole index, which takes the place of an earlier one at once."""
    writing, replaced = partial / WRITING, partial / "replaced"
    for left_over in (writing, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    writing.mkdir()
    if facts.settings.precision == "int8":
        facts = replace(facts, bound=common_bound(runs))
    write_rows(writing / ROWS_FILE, merge(runs, places, facts.codec))
    facts.write(writing)
    if out.exists():
        out.rename(replaced)
    writing.rename(out)


def _remove(partial: Path) -> None:
    """Deletes what makes the folder an index's last, so that a killed run leaves one that the next takes on."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (FACTS_FILE, PROBES_FILE):
            path.unlink()
    (partial / FACTS_FILE).unlink()
    shutil.rmtree(partial)


def _read_place(place: Path, facts: IndexFacts) -> IndexFacts | None:
    """The facts of an index with the same settings and folder by the same model, None where `place` is free.

    Raises:
        ValueError: If there is anything else.
    """
    if not place.exists() or (place.is_dir() and {path.name for path in place.iterdir()} <= BEFORE_FACTS):
        return None
    there = IndexFacts.read(place, "out")
    another = "Choose another place, or delete it."
    if there.folder != facts.folder:
        raise ValueError(
            f"`out` is {str(place)!r}, an index of the folder {there.folder!r}; expected one of {facts.folder!r}. "
            f"{another}"
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
    return there


def _version(path: Path) -> str:
    """Changes when the file does."""
    try:
        status = path.stat()
    except OSError:  # a dangling link, which reading will report
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _embed_files(folder, file_names, versions, model, processor, partial, batch_size, settings) -> list[Skipped]:
    """Embeds files into parts: files that appear whole, so that a killed run leaves only complete ones."""
    skipped: list[Skipped] = []
    rows: list[dict[str, Any]] = []
    part_numbers = count(len(list(partial.glob("part-*.arrow"))))

    def write_part() -> None:
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        columns |= {name: np.stack(columns[name]) for name in ("embedding", "memory") if name in columns}
        write_rows(partial / f"part-{next(part_numbers):06d}.arrow", [columns])
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

    with tqdm(total=len(versions), initial=len(versions) - len(file_names), desc="images", unit="image") as progress:
        for batch in read_batches(folder, file_names, batch_size, skipped):
            for (file_name, image), arrays in apply_to_batch(embed, batch, skipped):
                facts = {"file_name": file_name, "width": image.width, "height": image.height}
                rows.append({**facts, "version": versions[file_name], **arrays})
            progress.update(min(batch_size, progress.total - progress.n))
            if len(rows) >= ROWS_PER_PART:
                write_part()
    if rows:
        write_part()
    return skipped


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


def _bytes_per_image(rows: Dataset) -> int:
    names = [name for name in ("embedding", "memory") if name in rows.column_names]
    return sum(ArrayColumn(rows, name)[:1].nbytes for name in names)
