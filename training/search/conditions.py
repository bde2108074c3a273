"""Conditions by which a search is limited to some of the rows of an index: kinds, and values of metadata."""

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mmgem.training.search.settings import KINDS

COLUMNS = ("file_name", "kind", "part", "text", "width", "height")  # of every index; others are metadata
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(r"\s*([^=!<>]+?)\s*(!=|<=|>=|=|<|>)(?!=)\s*(.*?)\s*", flags=re.DOTALL)


class Condition(NamedTuple):
    """A condition on a value that a row has.

    It holds if the row has the value, and for a list, if it holds for one of it. A number is compared with numbers,
    and with texts that are one; other values are compared as texts. `!=` holds where `=` does not.

    Args:
        column: One of `COLUMNS`, or a name in the metadata.
        operator: `=`, `!=`, `<`, `<=`, `>` or `>=`.
        value: What is compared with.
    """

    column: str
    operator: str
    value: str | float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parses a condition such as `year>=2020` or `label=red star`.

        Raises:
            ValueError: If it is none.
        """
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise ValueError(f"`where` is {text!r}; expected NAME, one of {' '.join(_OPERATORS)}, and a value.")
        column, name, value = match.groups()
        number = _number(value)
        if number is None and name not in ("=", "!=") and _is_float(value):
            raise ValueError(f"`where` is {text!r}; expected a finite number, or a word, after {name}.")
        return cls(column, name, value if number is None else number)

    def holds(self, own: Any) -> bool:
        """Whether it holds for a value of a row, which may be None."""
        if self.operator == "!=":
            return not self._replace(operator="=").holds(own)
        compare = _OPERATORS[self.operator]
        for one in own if isinstance(own, list) else [own]:
            if one is None:
                continue
            if isinstance(self.value, str):
                if compare(_text(one), self.value):
                    return True
            elif (number := _number(one)) is not None and compare(number, self.value):
                return True
        return False


def select_rows(table: pa.Table, kinds: Iterable[str], conditions: Sequence[Condition]) -> np.ndarray:
    """Finds the rows that are of one of some kinds, and for which all conditions hold.

    Args:
        table: The rows of an index.
        kinds: The kinds; none for all.
        conditions: The conditions.

    Returns:
        (n,) Their numbers.

    Raises:
        ValueError: For a kind that no row is of, or a name that no row has.
    """
    is_selected = np.ones(len(table), bool)
    if kinds := list(kinds):
        own, their_kind = _distinct(table["kind"])
        for kind in kinds:
            if kind not in own:
                there = ", ".join(kind for kind in KINDS if kind in own)
                raise ValueError(f"`kinds` holds {kind!r}, of which the index has none; expected some of {there}.")
        is_selected = np.array([kind in kinds for kind in own])[their_kind]
    if metadata := [condition for condition in conditions if condition.column not in COLUMNS]:
        texts, their_text = _distinct(table["metadata"])
        objects = [json.loads(text) if text else {} for text in texts]
        names = {name for one in objects for name in one}
        for condition in metadata:
            if condition.column not in names:
                known = ", ".join(sorted({*names, *COLUMNS}))
                raise ValueError(f"`where` names {condition.column!r}, which no row has; expected one of {known}.")
    for condition in conditions:
        if condition.column in COLUMNS:
            values, their_value = _distinct(table[condition.column])
        else:
            values, their_value = [one.get(condition.column) for one in objects], their_text
        is_selected &= np.array([condition.holds(value) for value in values], bool)[their_value]
    return np.flatnonzero(is_selected)


def _distinct(column: pa.ChunkedArray) -> tuple[list, np.ndarray]:
    """The distinct values of a column, and which of them each row has."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), np.from_dlpack(encoded.indices)  # `to_numpy` imports pandas


def _number(value: Any) -> float | int | None:
    if isinstance(value, str | int):
        with suppress(ValueError):
            return int(value)  # exactly: ids may be larger than what a float tells apart
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):  # a JSON object, a word
        return None
    return number if math.isfinite(number) else None  # "nan" is a word, too


def _is_float(word: str) -> bool:
    try:
        return bool(word) and float(word) is not None
    except ValueError:
        return False


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
