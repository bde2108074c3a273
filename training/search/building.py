"""A search index of a folder of images and texts is made, or brought up to date."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mmgem.processing.image_loading import MAX_PIXELS
from mmgem.training.data.descriptions import Description, read_descriptions
from mmgem.training.data.image_files import FoundImages, ImageReader, Skipped, find_images, shorter_side_for
from mmgem.training.data.image_folder import METADATA_NAMES
from mmgem.training.output_lock import one_writer
from mmgem.training.progress import progress
from mmgem.training.search.checked_files import DamagedFileError
from mmgem.training.search.fingerprint import Fingerprint
from mmgem.training.search.inverted_lists import is_large
from mmgem.training.search.item_embedder import ROWS_PER_PART, ItemEmbedder, ReadItem
from mmgem.training.search.items import (
    EMBEDDED_AS,
    TEXT_SUFFIXES,
    WHOLE_IMAGES,
    Item,
    RowKey,
    content_of,
    is_text_file,
    items_of_image,
    read_texts,
)
from mmgem.training.search.list_making import make_lists
from mmgem.training.search.merging import (
    EarlierRows,
    EarlierRun,
    Place,
    common_bound,
    finished_run,
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

logger = logging.getLogger(__name__)

# What may be added to an index that does not have it.
_ADDED = ("captions", "regions", "texts")


class IndexReport(NamedTuple):
    """Report of `build_index`.

    Args:
        images: Whole images in the index.
        embedded: How many of all rows it had to embed.
        skipped: The files it left out, and folders it could not look into.
        bytes_per_image: Bytes that the vectors and the memory of one image take.
        passed_over: How many files and links there are that are not read, by kind, see `FoundImages`.
        rows: How many rows of each kind there are, see `Item`.
        recall: Of a search by lists, see `InvertedLists`; nothing where a search compares all vectors.
    """

    images: int
    embedded: int
    skipped: list[Skipped]
    bytes_per_image: int
    passed_over: dict[str, int]
    rows: dict[str, int]
    recall: dict[str, float] = {}


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
    found = find_images(folder, TEXT_SUFFIXES if texts is not None else (), names)
    for metadata in METADATA_NAMES:  # which say something of the others
        found.versions.pop(metadata, None)
    folder, out = Path(folder).resolve(), Path(out).resolve()
    if out.name == UNFINISHED and is_index(out.parent):
        raise ValueError(f"`out` is {str(out)!r}, where an index keeps what is unfinished; expected another place.")
    items = {"image_mode": image_mode, "captions": captions, "regions": regions, "texts": texts}
    settings = IndexSettings.settle(model, vectors, dimensions, precision, memory, **items)
    skipped: list[Skipped] = []
    needed = {} if settings.captions is None else {"captions": f"`captions` is {settings.captions!r}"}
    needed |= {"boxes": "`regions` is 'boxes'"} if settings.regions == "boxes" else {}
    descriptions = read_descriptions(folder, found, skipped, needed)
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
    earlier = EarlierRows(runs)
    embedder = ItemEmbedder(model, processor, settings, unfinished, skipped)
    shorter_side = None if settings.regions is not None else shorter_side_for(processor)  # boxes are in full pixels
    reader = ImageReader(folder, shorter_side, max_pixels, prepare=embedder.prepare)
    try:  # what was embedded is kept, also of a run that is interrupted
        rows = _embed_texts(folder, found, descriptions, settings, earlier, embedder, skipped)
        rows |= _embed_images(reader, batch_size, found, descriptions, settings, earlier, embedder, skipped)
    finally:
        embedder.write()
    rows |= {key: place for key, place in earlier.by_key.items() if _is_hidden(key[0], found)}
    known_runs, runs = len(runs), finished + runs_of_parts(unfinished, facts)
    new = {key: place for number in range(known_runs, len(runs)) for key, _, place in runs[number].places(number)}
    rows = sort_rows(rows | new)
    skipped = _unseen(found, rows) + skipped
    if not rows:
        remove_parts(unfinished)
        if not any(out.iterdir()):
            out.rmdir()
        what = "no image" if texts is None else "nothing"
        such = f", such as {skipped[0].file_name!r}: {skipped[0].reason}" if skipped else "; expected something."
        raise ValueError(f"`folder` is {str(folder)!r}, where {what} can be read{such}")
    if not _is_current(stored, facts, rows):
        if settings.precision == "int8":
            facts = replace(facts, bound=common_bound(runs))
        batches = merge(runs, rows, facts.codec)
        make = _list_maker(facts, model, processor, stored, rows)
        write_index(out, facts, stored.version + 1 if stored else 1, len(rows), batches, whole_images(rows), make)
    remove_parts(unfinished)
    counts = dict(Counter(kind for _, kind, _ in rows))
    images = sum(counts.get(kind, 0) for kind in WHOLE_IMAGES)
    if len({EMBEDDED_AS[kind] for kind in counts}) > 1 and model.config.calibrated_modalities is None:
        logger.warning(
            "images and texts are in one index, and the model is not calibrated: texts may come first whatever is "
            "looked for; see `mmgem calibrate`"
        )
    written = read_index(out, "out")
    recall = {} if written.lists is None else written.lists.recall
    kinds_of_rows = dict(sorted(counts.items()))
    return IndexReport(images, len(new), skipped, written.bytes_per_row, found.passed_over, kinds_of_rows, recall)


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


def _list_maker(facts: IndexFacts, model, processor, stored: StoredIndex | None, rows: Mapping[RowKey, Place]):
    """As for `write_index`: lists that keep what is in those of the index that is there."""
    earlier = earlier_rows = None
    if stored is not None and stored.lists is not None:
        with suppress(DamagedFileError):  # they are made anew
            earlier = stored.lists.read()
            earlier_rows = np.array([place.row if place.run == 0 else -1 for place in rows.values()])
    return lambda written: make_lists(written, facts, model, processor, earlier, earlier_rows)


def _is_current(stored: StoredIndex | None, facts: IndexFacts, rows: dict[RowKey, Place]) -> bool:
    """Whether the index that is there has these rows, and no others, of the same folder."""
    if stored is None or stored.rows is None or stored.version == 0:
        return False
    if (stored.facts.folder, stored.facts.model) != (facts.folder, facts.model):
        return False
    if stored.facts.settings != facts.settings:
        return False
    if is_large(len(stored.rows), facts.settings.vectors) != (stored.lists is not None):
        return False
    if stored.lists is not None and stored.lists.file.damaged_blocks():
        return False
    return rows == EarlierRows([EarlierRun(stored.rows, stored.facts.codec)]).by_key


def _is_hidden(file_name: str, found: FoundImages) -> bool:
    """Whether a file was not found, but may be there."""
    return file_name not in found.versions and found.hiding_place(file_name) is not None


def _unseen(found: FoundImages, rows: dict[RowKey, Place]) -> list[Skipped]:
    """What cannot be seen, and what is kept of it."""
    kept = Counter(found.hiding_place(name) for name, _, _ in rows if name not in found.versions)
    report = []
    for place in sorted({*found.unseen, *filter(None, kept)}):
        reason = found.unseen.get(place, "it is empty, as if its disk were away")
        if kept[place]:
            reason += f"; what the index has of it, {kept[place]} rows, is kept until it is gone"
        report.append(Skipped(place, reason))
    return report


def _embed_texts(
    folder: Path,
    found: FoundImages,
    descriptions: dict[str, Description],
    settings: IndexSettings,
    earlier: EarlierRows,
    embedder: ItemEmbedder,
    skipped: list[Skipped],
) -> dict[RowKey, Place]:
    """Embeds the captions and the texts that are new; returns the rows of the others."""
    rows: dict[RowKey, Place] = {}
    new: list[ReadItem] = []

    def items() -> Iterator[Item]:
        for file_name, version in list(found.versions.items()):
            if is_text_file(file_name):
                yield from _read_texts(folder, file_name, settings, found, skipped)
            elif settings.captions == "beside":
                of_image = items_of_image(file_name, version, descriptions.get(file_name), settings)
                yield from (item for item in of_image if item.kind == "caption")

    for item in progress(items(), desc="texts", unit="text") if settings.has_texts else items():
        content = content_of(item, settings)
        if place := earlier.unchanged(item) or earlier.same(item, content):
            rows[item.key] = place
            continue
        new.append(ReadItem(item, content))
        if len(new) == ROWS_PER_PART:
            embedder.embed(new)
            new = []
    embedder.embed(new)
    return rows


def _read_texts(
    folder: Path, file_name: str, settings: IndexSettings, found: FoundImages, skipped: list[Skipped]
) -> Iterator[Item]:
    """Reads the texts of a file; what cannot be read now is noted as unseen, what is broken as left out."""
    try:
        file_name.encode()  # a name that is not valid UTF-8 can be neither stored nor printed
        yield from read_texts(folder, file_name, settings.texts or "", skipped)
    except OSError as error:
        found.unseen[file_name] = f"it cannot be read: {error.strerror or error}"
        del found.versions[file_name]
    except ValueError as error:
        shown = os.fsencode(file_name).decode(errors="replace")
        skipped.append(Skipped(shown, " ".join(str(error).split())))


def _embed_images(
    reader: ImageReader,
    batch_size: int,
    found: FoundImages,
    descriptions: dict[str, Description],
    settings: IndexSettings,
    earlier: EarlierRows,
    embedder: ItemEmbedder,
    skipped: list[Skipped],
) -> dict[RowKey, Place]:
    """Embeds the images and regions that are new; returns the rows of the others."""
    rows: dict[RowKey, Place] = {}
    todo: dict[str, list[Item]] = {}
    images = [file_name for file_name in found.versions if not is_text_file(file_name)]
    for file_name in images:
        of_image = items_of_image(file_name, found.versions[file_name], descriptions.get(file_name), settings)
        for item in of_image:
            if item.kind == "caption":
                continue
            if place := earlier.unchanged(item):
                rows[item.key] = place
            else:
                todo.setdefault(file_name, []).append(item)

    def is_known(file_name: str, content: str) -> bool:
        return all(earlier.same(item, content_of(item, settings, content)) for item in todo[file_name])

    reader.is_known = is_known
    with progress(total=len(images), initial=len(images) - len(todo), desc="images", unit="image") as bar:
        for files in reader.read_batches(list(todo), batch_size, skipped):
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
