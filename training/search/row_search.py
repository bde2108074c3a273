"""The rows of a search index, asked by words and by metadata alone: without a model, and without importing torch."""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmgem.training.search.conditions import Condition, select_rows
from mmgem.training.search.hybrid import LexicalSearch, fuse_ranks
from mmgem.training.search.items import WHOLE_IMAGES
from mmgem.training.search.storage import (
    UNFINISHED,
    IndexFacts,
    IndexRows,
    StoredIndex,
    check_is_index,
    is_index,
    read_index,
)


class Hit(NamedTuple):
    """One answer of a search.

    Args:
        score: The cosine to the query, -1 to 1, or MaxSim of several vectors; that of `fuse_ranks` in a hybrid search
            and one by words; 1 where nothing but conditions was asked.
        path: The file.
        row: The number of the row in the index.
        kind: What it is of the file, see `Item`.
        part: The number of the caption, region or record.
        text: The text, or the captions.
        box: Of a region `[x0, y0, x1, y1]` in pixels.
    """

    score: float
    path: Path
    row: int
    kind: str
    part: int
    text: str
    box: list[float] | None

    @property
    def details(self) -> dict[str, Any]:
        """What is known of the row besides score and file; of a whole image nothing, as its path says all."""
        if self.kind == "image":
            return {}
        details = {"kind": self.kind, "part": self.part, "text": self.text}
        return details if self.box is None else details | {"box": self.box}


class RowSearch:
    """The rows of an index, with what is said of them.

    Args:
        rows: The rows of the index.
        facts: What is known of them.
    """

    def __init__(self, rows: IndexRows, facts: IndexFacts):
        self.rows, self.facts = rows, facts
        self._selected: tuple[tuple, np.ndarray] = ((), np.empty(0, int))  # the last limits, and their rows

    @classmethod
    def load(cls, path: str | Path) -> "RowSearch":
        """Reads an index from disk.

        Args:
            path: What `build_index` wrote.

        Raises:
            FileNotFoundError: If there is no such folder, or no finished index in it.
            ValueError: If the folder is not an index, or a damaged one.
        """
        stored = read_finished(path)
        assert stored.rows is not None
        return cls(stored.rows, stored.facts)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def folder(self) -> Path:
        """The folder where the files are, or were."""
        return Path(self.facts.folder)

    def path(self, row: int) -> Path:
        """Returns the file of a row."""
        return self.folder / self.rows.table["file_name"][row].as_py()

    def list_rows(
        self, top: int = 10, kinds: Iterable[str] | None = None, where: Sequence[Condition] | None = None
    ) -> list[Hit]:
        """Lists rows in the order of the index.

        Args:
            top: The most that are listed.
            kinds: The kinds of rows, see `Item`; by default all.
            where: Conditions that hold for them.

        Raises:
            ValueError: If `top` is below 1, or for a kind or a name that no row has.
        """
        check_top(top)
        selected = self._select(kinds, where)
        rows = range(min(top, len(self))) if selected is None else selected[:top]
        return [self._hit(1.0, int(row)) for row in rows]

    def search_words(
        self,
        text: str,
        top: int = 10,
        kinds: Iterable[str] | None = None,
        where: Sequence[Condition] | None = None,
    ) -> list[Hit]:
        """Searches the rows that have words of a text, as `SearchIndex.search` does with a `lexical_weight` of 1.

        Args:
            text: The words.
            top: The number of answers; fewer if fewer rows have such a word.
            kinds, where: As for [`list_rows`].

        Raises:
            ValueError: As [`list_rows`], and if there is no text.
        """
        check_top(top)
        check_says_something(text)
        ranking = self._lexical_search.rank(text, top, self._select(kinds, where))
        scores, rows = fuse_ranks([ranking], [1.0], top)
        return [self._hit(float(score), int(row)) for score, row in zip(scores, rows, strict=True)]

    def check_memory(self) -> None:
        """Refuses an index without memories."""
        if self.facts.settings.memory is None:
            raise ValueError(
                f"the index of {self.facts.folder!r} has no memory; expected one that was made `--with-memory`."
            )

    def rows_of_images(self, images: Sequence[str | Path]) -> list[int]:
        """The rows of whole images, given by their names in the index or by paths that lead to them.

        Raises:
            ValueError: If there are none, or one is not in the index.
        """
        if not images:
            raise ValueError("`images` is empty; expected at least one name.")
        of_whole = zip(self.rows["file_name"], self.rows["kind"], strict=True)
        row_of = {name: row for row, (name, kind) in enumerate(of_whole) if kind in WHOLE_IMAGES}
        rows = []
        for image in images:
            # A path may lead there through a link, and the file may itself be one.
            paths = (Path(os.path.abspath(image)), Path(image).resolve())
            inside = [path.relative_to(self.folder).as_posix() for path in paths if path.is_relative_to(self.folder)]
            row = next((row_of[name] for name in [Path(image).as_posix(), *inside] if name in row_of), None)
            if row is None:
                such = f"names such as {min(row_of)!r}" if row_of else "an index of images"
                raise ValueError(f"`images` holds {str(image)!r}, which is not in the index; expected {such}.")
            rows.append(row)
        return rows

    def _select(self, kinds: Iterable[str] | None, where: Sequence[Condition] | None) -> np.ndarray | None:
        """The numbers of the rows that are searched; None for all."""
        limits = _all_of("kinds", kinds, str), _all_of("where", where, Condition)
        if limits == ((), ()):
            return None
        if self._selected[0] != limits:
            self._selected = limits, select_rows(self.rows.table, *limits)
        selected = self._selected[1]
        return None if len(selected) == len(self) else selected

    @cached_property
    def _lexical_search(self) -> LexicalSearch:
        columns = zip(self.rows["text"], self.rows["file_name"], strict=True)
        return LexicalSearch([f"{text} {file_name}" for text, file_name in columns])

    def _hit(self, score: float, row: int) -> Hit:
        kind, part, text, box = (self.rows.table[name][row].as_py() for name in ("kind", "part", "text", "box"))
        return Hit(score, self.path(row), row, kind, part, text, box)


def check_finished(path: str | Path) -> None:
    """Refuses what is no finished index, without reading it; errors are those of `RowSearch.load`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`path` is {str(path)!r}, which is not there; expected an index.")
    if not is_index(path) and is_index(path / UNFINISHED):
        raise FileNotFoundError(
            f"`path` is {str(path)!r}, an index that is still being made, or whose making was interrupted and "
            "goes on when it is started again; expected a finished one."
        )
    check_is_index(path, "path")


def read_finished(path: str | Path) -> StoredIndex:
    """Reads an index that has rows; errors are those of `RowSearch.load`."""
    path = Path(path)
    check_finished(path)
    stored = read_index(path, "path")
    if stored.rows is None:
        raise ValueError(f"`path` is {str(path)!r}, which holds parts of an index; expected the folder it is in.")
    return stored


def check_top(top: int) -> None:
    """Refuses what is no number of answers, or one below 1."""
    if not is_whole(top) or top < 1:
        raise ValueError(f"`top` is {top!r:.80}; expected 1 or more, a whole number.")


def _all_of(name: str, values: Iterable[Any] | None, kind: type) -> tuple:
    """Several values of a kind, of which one alone is refused."""
    found = () if values is None or isinstance(values, str) else tuple(values)
    if isinstance(values, str) or not all(isinstance(value, kind) for value in found):
        raise TypeError(f"`{name}` is {values!r:.80}; expected a list of {kind.__name__}.")
    return found


def is_whole(number: Any) -> bool:
    """Whether it is a whole number, of any library, and no truth value."""
    return hasattr(number, "__index__") and not isinstance(number, bool)


def check_says_something(text: str) -> None:
    """Refuses what is no text, or one without a word."""
    if not isinstance(text, str):
        raise TypeError(f"`text` is a {type(text).__name__}, {text!r:.80}; expected a string.")
    if not text.strip():
        raise ValueError(f"`text` is {text!r}; expected something to look for.")
