"""JSON that every reader takes: a figure that is not a number is null, which Python alone would write as `NaN`; and
JSON of others, which may be anything."""

import json
import math
from pathlib import Path
from typing import Any

from mmgem.training.output_folder import whole_file


def to_json(value: Any, **options: Any) -> str:
    """Returns a value as JSON text; options as for `json.dumps`."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def from_json(text: str | bytes) -> Any:
    """Read JSON text.

    Args:
        text: UTF-8.

    Raises:
        ValueError: If it is no JSON, has an object with a key twice, or is nested more deeply than Python reads.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except RecursionError as error:
        raise ValueError("is nested too deeply; expected JSON that can be read.") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):  # of which Python alone would keep the last
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice; expected it once.")
    return values


def write_json(path: Path, content: dict | list) -> None:
    """Write a file of JSON that people can read, and that is there at once or not at all."""
    with whole_file(path) as partial:
        partial.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
