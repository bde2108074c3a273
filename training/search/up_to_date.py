"""An index is brought up to date by the name of its model, which is loaded only where there is something to embed.

To import torch and transformers and to load a model takes longer than to look at thousands of files. So an index keeps
a stamp of its model's files beside its fingerprint: as long as the stamp stays, so does the model.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import mmgem
import mmgem.processing
import mmgem.training
from mmgem.processing.image_loading import MAX_PIXELS
from mmgem.training.data.image_files import content_hash
from mmgem.training.json_text import to_json
from mmgem.training.output_lock import one_writer
from mmgem.training.search.folder_items import FolderItems
from mmgem.training.search.index_report import IndexReport, report_on
from mmgem.training.search.items import RowKey
from mmgem.training.search.merging import EarlierRows, EarlierRun, Place, is_current
from mmgem.training.search.storage import UNFINISHED, StoredIndex, note_stamp, read_index

_LIBRARIES = ("pillow", "timm", "tokenizers", "torch", "transformers")  # that decide what an embedding is


@one_writer
def update_index(
    folder: str | Path,
    model: str | Path,
    out: str | Path,
    names: Sequence[str] | None = None,
    batch_size: int = 32,
    moved: bool = False,
    max_pixels: int = MAX_PIXELS,
    **settings: Any,
) -> IndexReport:
    """Brings an index up to date, or makes it, as `build_index` does.

    Args:
        folder, out, names, batch_size, moved, max_pixels: As for `build_index`.
        model: The folder of a checkpoint, or a name on the Hub.
        settings: The other arguments of `build_index`, which say what is in the index.

    Raises:
        Exception: As `load_checkpoint` and `build_index`.
    """
    stamp = stamp_of(model, settings)
    items = None
    with suppress(OSError, ValueError):  # which `build_index` says, if it meets it
        stored = None if stamp is None else _read_same(folder, model, out, stamp)
        if stored is not None:
            items = FolderItems(folder, stored.facts.settings, names)
            if report := _find_unchanged(stored, items.unread()):
                return report
    from mmgem.training.loading import load_checkpoint
    from mmgem.training.search.building import build_index

    loaded, processor = load_checkpoint(model)
    settings |= {"moved": moved, "max_pixels": max_pixels, "names": names, "items": items}
    report = build_index(folder, loaded, processor, out, batch_size, **settings)
    note_stamp(Path(out), stamp)
    return report


def stamp_of(model: str | Path, settings: Mapping[str, Any]) -> str | None:
    """Returns what stays the same only as long as a model does, with some settings.

    It is of the files of the model, of the code of mmgem, and of the versions of libraries. A file whose content
    changed has another size or time, of its content or of its entry in the folder, which nobody can set.

    Args:
        model: As for `update_index`.
        settings: Any that JSON can hold.

    Returns:
        32 digits; None if the files are not known, those of a name on the Hub and of an adapter's base.
    """
    folder = Path(model).resolve()
    if not folder.is_dir() or (folder / "adapter_config.json").exists():
        return None
    code = [place for package in (mmgem, mmgem.processing, mmgem.training) for place in package.__path__]
    try:
        files = [file for place in (folder, *map(Path, code)) for file in sorted(place.rglob("*")) if file.is_file()]
        known = [(str(file), *_status(file)) for file in files if file.suffix != ".pyc"]
    except OSError:  # somebody writes there
        return None
    return content_hash(to_json([settings, *map(_version, _LIBRARIES), known]).encode())


def _read_same(folder: str | Path, model: str | Path, out: str | Path, stamp: str) -> StoredIndex | None:
    """Reads a finished index of the same folder by the same model; None if it is anything else."""
    out = Path(out).resolve()
    stored = read_index(out, "out")
    known = stored.stamp, stored.facts.folder, stored.facts.model
    is_same = known == (stamp, _resolved(folder), _resolved(model)) and not (out / UNFINISHED).exists()
    return stored if is_same else None


def _find_unchanged(stored: StoredIndex, items: FolderItems) -> IndexReport | None:
    """The report on an index in which nothing is to be changed; None if anything is, or may be."""
    assert stored.rows is not None
    earlier = EarlierRows([EarlierRun(stored.rows, stored.facts.codec)])
    rows: dict[RowKey, Place] = {}
    for item in chain(items.texts(), chain.from_iterable(of_image for _, of_image in items.images())):
        place = earlier.unchanged(item)
        if place is None:
            return None
        rows[item.key] = place
    if items.left_out(rows) or not is_current(stored, stored.facts, rows) or stored.rows.damaged().any():
        return None
    return report_on(stored, rows, 0, items)


def _resolved(folder: str | Path) -> str:
    return str(Path(folder).resolve())


def _status(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _version(library: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(library)
    return None
