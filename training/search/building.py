"""A search index of a folder of images and texts is made, or brought up to date."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from mmgem.processing.image_loading import MAX_PIXELS
from mmgem.training.data.image_files import ImageReader, shorter_side_for
from mmgem.training.output_lock import one_writer
from mmgem.training.progress import progress
from mmgem.training.search.checked_files import DamagedFileError
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.folder_items import FolderItems
from mmgem.training.search.index_report import IndexReport, report_on
from mmgem.training.search.item_embedder import ROWS_PER_PART, ItemEmbedder, ReadItem
from mmgem.training.search.items import Item, RowKey, content_of
from mmgem.training.search.list_making import make_lists
from mmgem.training.search.merging import (
    EarlierRows,
    EarlierRun,
    Place,
    common_bound,
    finished_run,
    is_current,
    merge,
    runs_of_parts,
    sort_rows,
    whole_images,
)
from mmgem.training.search.settings import CaptionMode, ImageMode, IndexSettings, Precision
from mmgem.training.search.storage import (
    UNFINISHED,
    IndexFacts,
    StoredIndex,
    is_free,
    is_index,
    read_index,
    remove_parts,
    write_index,
)

# What may be added to an index that does not have it.
_ADDED = ("captions", "regions", "texts")


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
    image_mode: ImageMode = "image",
    captions: CaptionMode | None = None,
    regions: Literal["boxes"] | int | None = None,
    texts: str | None = None,
    names: Sequence[str] | None = None,
    items: FolderItems | None = None,
) -> IndexReport:
    """Embeds every image below a folder into an index, or brings an index up to date.

    What is said of images (captions, boxes, and metadata that a search filters by) is read from the metadata of the
    folder, see `read_image_folder`. Texts, captions and regions have rows of their own beside those of the images.

    An item is not embedded again whose file has the size and time it had, or whose content a file had, whatever it
    was called; whether the earlier run finished or was killed. Rows of files that are gone are dropped. Rows of files
    that cannot be seen are kept: those in a folder that cannot be listed, or is empty, as that of a disk that is away.
    Files that cannot be read are left out. All of this is reported.

    Args:
        folder: Where the files are, at any depth.
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
        image_mode: How images and regions are embedded: `"image"`, by the vision tower alone, or `"fused"`, through
            the language model, which is what CoMa trains (https://arxiv.org/abs/2511.08480).
        captions: `"beside"` gives each caption of an image a row of its own; `"fused"` embeds each image together with
            its first caption, if it has one. By default captions are only searched by their words.
        regions: `"boxes"` gives each box of the metadata a row of its own; a number n each cell of a grid of n x n.
        texts: Gives each text a row of its own: `.txt` and `.md` files, and this column of `.jsonl`, `.csv` and
            `.parquet` files, whose other columns are metadata.
        names: The only files that are indexed, relative to `folder`, with forward slashes; by default all below it.
        items: What is there of them, if that is known, for an index with the same settings.

    Returns:
        How many images there are, and were embedded, and what was left out.

    Raises:
        BlockingIOError: If another job writes `out`.
        FileNotFoundError: If `folder` is not there, or has no metadata with the captions or boxes that are asked for.
        ValueError: If there is nothing below it that can be read, if the model does not give what is asked for, or if
            `out` is something else already, such as an index with other settings.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; expected 1 or more.")
    out = Path(out).resolve()
    if out.name == UNFINISHED and is_index(out.parent):
        raise ValueError(f"`out` is {str(out)!r}, where an index keeps what is unfinished; expected another place.")
    kinds = {"image_mode": image_mode, "captions": captions, "regions": regions, "texts": texts}
    settings = IndexSettings.settle(model, vectors, dimensions, precision, memory, **kinds)
    if items is None or items.settings != settings:
        items = FolderItems(folder, settings, names)
    facts = _facts_of(model, processor, items)
    unfinished = out / UNFINISHED
    stored = None if is_free(out) else _read_same(out, facts, moved)
    facts = _begin(unfinished, facts, stored, moved)

    finished, parts = finished_run(stored), runs_of_parts(unfinished, facts)
    earlier = EarlierRows(finished + parts)
    embedder = ItemEmbedder(model, processor, items.settings, unfinished, items.skipped)
    try:  # what was embedded is kept, also of a run that is interrupted
        rows = _embed_texts(items, earlier, embedder)
        rows |= _embed_images(items, earlier, embedder, batch_size, max_pixels)
    finally:
        embedder.write()
    rows |= {key: place for key, place in earlier.by_key.items() if items.hides(key[0])}
    known_runs, runs = len(finished + parts), finished + _read_again(unfinished, facts, len(parts) + embedder.written)
    new = {key: place for number in range(known_runs, len(runs)) for key, _, place in runs[number].places(number)}
    rows = sort_rows(rows | new)
    if not rows:
        _refuse(out, items)
    if not is_current(stored, facts, rows):
        if items.settings.precision == "int8":
            facts = replace(facts, bound=common_bound(runs))
        batches = merge(runs, rows, facts.codec)
        make = _list_maker(facts, model, processor, stored, rows)
        write_index(out, facts, stored.version + 1 if stored else 1, len(rows), batches, whole_images(rows), make)
    remove_parts(unfinished)
    return report_on(read_index(out, "out"), rows, len(new), items)


def _read_again(unfinished: Path, facts: IndexFacts, count: int) -> list[EarlierRun]:
    """Reads the parts of this run too; one that were missing now would leave its rows out, or give them to others."""
    parts = runs_of_parts(unfinished, facts)
    if len(parts) != count:
        raise DamagedFileError(
            f"{str(unfinished)!r} has {len(parts)} parts that can be read; expected {count}, as were written. The "
            "same command embeds anew what is lost."
        )
    return parts


def _facts_of(model, processor, items: FolderItems) -> IndexFacts:
    """The facts of an index by a model that is at hand."""
    kinds = ["weights", *model.config.embedded_kinds, *([] if items.settings.memory is None else ["memory"])]
    name = model.name_or_path
    return IndexFacts(
        folder=str(items.folder),
        model=str(Path(name).resolve()) if name and Path(name).is_dir() else name,
        settings=items.settings,
        fingerprint=Fingerprint.take(model, processor, kinds),
    )


def _begin(unfinished: Path, facts: IndexFacts, stored: StoredIndex | None, moved: bool) -> IndexFacts:
    """Says what the parts are of that are about to be written; returns that."""
    begun = _read_same(unfinished, facts, moved) if is_index(unfinished) else None
    if begun is None:
        remove_parts(unfinished)  # what a run left that was killed while it did so itself
    if known := stored or begun:  # what an index is known by stays, however many models pass for the first
        facts = replace(facts, fingerprint=known.facts.fingerprint)
    write_index(unfinished, facts, begun.version + 1 if begun else 1)
    return facts


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
        if kept != asked and not (name in _ADDED and kept is None):
            raise ValueError(
                f"`out` is {str(place)!r}, an index with {name} {kept}; expected {asked}, as is asked for now. "
                f"{another}"
            )
    return stored


def _refuse(out: Path, items: FolderItems) -> NoReturn:
    """Leaves nothing of an index that would be of nothing."""
    remove_parts(out / UNFINISHED)
    if not any(out.iterdir()):
        out.rmdir()
    skipped, what = items.left_out(()), "no image" if items.settings.texts is None else "nothing"
    such = f", such as {skipped[0].file_name!r}: {skipped[0].reason}" if skipped else "; expected something."
    raise ValueError(f"`folder` is {str(items.folder)!r}, where {what} can be read{such}")


def _list_maker(facts: IndexFacts, model, processor, stored: StoredIndex | None, rows: Mapping[RowKey, Place]):
    """As for `write_index`: lists that keep what is in those of the index that is there."""
    earlier = earlier_rows = None
    if stored is not None and stored.lists is not None:
        with suppress(DamagedFileError):  # they are made anew
            earlier = stored.lists.read()
            earlier_rows = np.array([place.row if place.run == 0 else -1 for place in rows.values()])
    return lambda written: make_lists(written, facts, model, processor, earlier, earlier_rows)


def _embed_texts(items: FolderItems, earlier: EarlierRows, embedder: ItemEmbedder) -> dict[RowKey, Place]:
    """Embeds the captions and the texts that are new; returns the rows of the others."""
    rows: dict[RowKey, Place] = {}
    new: list[ReadItem] = []
    has_texts = items.settings.has_texts
    for item in progress(items.texts(), desc="texts", unit="text") if has_texts else ():
        content = content_of(item, items.settings)
        if place := earlier.unchanged(item) or earlier.same(item, content):
            rows[item.key] = place
            continue
        new.append(ReadItem(item, content))
        if len(new) == ROWS_PER_PART:
            embedder.embed(new)
            new = []
    embedder.embed(new)
    return rows


def _embed_images(
    items: FolderItems, earlier: EarlierRows, embedder: ItemEmbedder, batch_size: int, max_pixels: int
) -> dict[RowKey, Place]:
    """Embeds the images and regions that are new; returns the rows of the others."""
    settings = items.settings
    rows: dict[RowKey, Place] = {}
    todo: dict[str, list[Item]] = {}
    known = 0
    for file_name, of_image in items.images():
        places = {item.key: place for item in of_image if (place := earlier.unchanged(item))}
        rows |= places
        if changed := [item for item in of_image if item.key not in places]:
            todo[file_name] = changed
        else:
            known += 1

    def is_known(file_name: str, content: str) -> bool:
        return all(earlier.same(item, content_of(item, settings, content)) for item in todo[file_name])

    # Boxes are pixels of a picture in full.
    shorter_side = None if settings.regions is not None else shorter_side_for(embedder.processor)
    reader = ImageReader(items.folder, shorter_side, max_pixels, is_known, embedder.prepare)
    with progress(total=known + len(todo), initial=known, desc="images", unit="image") as bar:
        for files in reader.read_batches(list(todo), batch_size, items.skipped):
            new: list[ReadItem] = []
            for file in files:
                for item in todo[file.file_name]:
                    content = content_of(item, settings, file.content)
                    if place := earlier.same(item, content):
                        rows[item.key] = place
                    else:
                        new.append(ReadItem(item, content, file.image, file.size, file.inputs))
            embedder.embed(new)
            bar.update(len(files))
    for file_name, content in reader.recognized.items():
        for item in todo[file_name]:
            rows[item.key] = earlier.same(item, content_of(item, settings, content))  # type: ignore[assignment]
    return rows
