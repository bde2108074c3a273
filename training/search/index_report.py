"""The report of how an index was made, or brought up to date."""

import logging
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from mmgem.training.data.image_files import Skipped
from mmgem.training.search.folder_items import FolderItems
from mmgem.training.search.items import EMBEDDED_AS, WHOLE_IMAGES, RowKey
from mmgem.training.search.storage import StoredIndex

logger = logging.getLogger(__name__)


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


def report_on(index: StoredIndex, rows: Collection[RowKey], embedded: int, items: FolderItems) -> IndexReport:
    """Reports on an index, and warns of kinds of rows that do not compare.

    Args:
        index: The index.
        rows: Its rows.
        embedded: How many of them are new.
        items: The items that it is of.
    """
    counts = dict(sorted(Counter(kind for _, kind, _ in rows).items()))
    is_calibrated = index.facts.fingerprint.settings.get("calibrated_modalities") is not None
    if len({EMBEDDED_AS[kind] for kind in counts}) > 1 and not is_calibrated:
        logger.warning(
            "images and texts are in one index, and the model is not calibrated: texts may come first whatever is "
            "looked for; see `mmgem calibrate`"
        )
    images = sum(counts.get(kind, 0) for kind in WHOLE_IMAGES)
    recall = {} if index.lists is None else index.lists.recall
    skipped, passed_over = items.left_out(rows), items.found.passed_over
    return IndexReport(images, embedded, skipped, index.bytes_per_row, passed_over, counts, recall)
