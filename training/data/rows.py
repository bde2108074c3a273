"""The columns of a row of training data. Sources and collator ask here, so that they agree on what can be trained."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

CAPTION_COLUMNS = ("captions", "caption", "text")
IMAGE_COLUMNS = ("image", "images")
ID_COLUMNS = ("image_id", "scene_id", "file_name")
LANGUAGE_PREFIX = "captions_"  # of columns with captions in other languages
TEXT_COLUMNS = ("long_caption", "region_captions", "label", "qa", "edit")  # beside captions
COLUMNS = (
    *IMAGE_COLUMNS,
    *CAPTION_COLUMNS,
    *ID_COLUMNS,
    *("queries", "long_caption", "boxes", "region_captions", "label", "qa", "hard_negatives"),
    *("edit", "edited_image", "instructions", "prompt_name"),
)
_WITHOUT_TEXTS = (*IMAGE_COLUMNS, *ID_COLUMNS, "boxes", "edit", "edited_image", "prompt_name")

ColumnName = str | list[str] | None  # of the data, for a column of ours


def captions_of(row: Mapping[str, Any]) -> list[str]:
    """The captions of a row that `check_row` has passed, from whichever of `CAPTION_COLUMNS` holds them; or []."""
    captions: str | list[str] = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), [])
    return [captions] if isinstance(captions, str) else list(captions)


def texts_of(row: Mapping[str, Any]) -> Iterator[str]:
    """Every text of a row that a model may read or write, whichever column holds it; a name of a file is none."""
    for column in COLUMNS:
        if column not in _WITHOUT_TEXTS:
            yield from _texts_in(row.get(column))
    yield from _texts_in((row.get("edit") or {}).get("instruction"))


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def checked_captions(fields: Mapping[str, Any]) -> list[str]:
    """The captions in fields that others wrote, from whichever of `CAPTION_COLUMNS` is filled; or [].

    Raises:
        ValueError: If they are no texts; the error is the end of a sentence that begins with the name of the row.
    """
    column = next((column for column in CAPTION_COLUMNS if fields.get(column)), None)
    if column is None:
        return []
    captions = [fields[column]] if isinstance(fields[column], str) else fields[column]
    check_texts(captions, f"has `{column}`")
    return list(captions)


def images_of(row: Mapping[str, Any]) -> list:
    """The images of a row: those in `images`, or the one in `image`; or []."""
    if row.get("images"):
        return list(row["images"])
    return [] if row.get("image") is None else [row["image"]]


def edit_of(row: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The instruction in a row's `edit` and the image that comes of it; None if either is missing."""
    edit = row.get("edit")
    if not edit or edit.get("instruction") is None or row.get("edited_image") is None:
        return None
    return edit["instruction"], row["edited_image"]


def edited_file_of(row: Mapping[str, Any]) -> str | None:
    """The file that a row's `edit` names, of the image that comes of it; None without an edit."""
    edit = row.get("edit")
    return None if not edit or edit.get("instruction") is None else edit.get("file_name")


def row_name(row: Mapping[str, Any], number: int) -> str:
    """The name of a row in error messages: its `row_key` where it has one, else its number, and its file."""
    if row.get("row_key") is not None:
        return f"row {row['row_key']!r}"
    return f"row {number}" + (f" ({row['file_name']!r})" if isinstance(row.get("file_name"), str) else "")


def check_row(row: Mapping[str, Any], name: str, needs_region_captions: bool = True) -> None:
    """Refuse a row that cannot be trained. It may be a pair, an image alone or a text alone.

    Args:
        row: Its columns, see [`MMGEMCollator`]; images need not be loaded.
        name: The name of the row in errors.
        needs_region_captions: Whether boxes may not be there without their captions.

    Raises:
        ValueError: If there is neither image nor text; a text is empty or no text; a label or an id is neither a text
            nor a number; where a list is expected there is none; boxes are none, or without their image or their
            captions; an instruction names no box; or an edited image has no instruction, or not exactly one image that
            it came from.
    """
    _list_in(row, "images", name)
    captions = [column for column in CAPTION_COLUMNS if row.get(column) is not None]
    if captions:
        filled = next((column for column in captions if row[column]), captions[0])
        check_texts([row[filled]] if isinstance(row[filled], str) else row[filled], f"{name} has `{filled}`")
    if not images_of(row) and not captions and not row.get("qa"):
        raise ValueError(f"{name} has columns {sorted(row)}; expected an `image`, one of {CAPTION_COLUMNS}, or both.")

    for column in ("label", *ID_COLUMNS):
        _check_name(row.get(column), f"{name} has `{column}`")
    if row.get("prompt_name") is not None:
        check_texts([row["prompt_name"]], f"{name} has `prompt_name`")
    if row.get("long_caption"):
        check_texts([row["long_caption"]], f"{name} has `long_caption`")
    languages = [column for column in row if column.startswith(LANGUAGE_PREFIX)]
    for column in ("queries", "region_captions", "hard_negatives", *languages):
        if row.get(column):
            check_texts(row[column], f"{name} has `{column}`")
    for turn in _list_in(row, "qa", name):
        if not isinstance(turn, Mapping) or not {"question", "answer"} <= set(turn):
            raise ValueError(f"{name} has {turn!r:.80} in `qa`; expected a `question` and an `answer`.")
        check_texts([turn["question"], turn["answer"]], f"{name} has `qa`")

    boxes, region_captions = _list_in(row, "boxes", name), row.get("region_captions") or []
    if odd := [box for box in boxes if not is_box(box)]:
        raise ValueError(f"{name} has {odd[0]!r:.80} in `boxes`; expected lists of [x0, y0, x1, y1], in pixels.")
    if len(boxes) != len(region_captions) and (region_captions or needs_region_captions):
        raise ValueError(
            f"{name} has {len(boxes)} `boxes` and {len(region_captions)} `region_captions`; expected as many of each."
        )
    if boxes and len(images_of(row)) != 1:
        raise ValueError(f"{name} has `boxes` and {len(images_of(row))} images; expected the one they lie in.")
    _check_instructions(_list_in(row, "instructions", name), len(boxes), name)
    _check_edit(row, name)


def is_box(box: object) -> bool:
    """Whether something is four finite numbers: a list, an array or a tensor of them."""
    edges = box.tolist() if hasattr(box, "tolist") else box
    return isinstance(edges, list | tuple) and len(edges) == 4 and all(map(_is_coordinate, edges))


def _is_coordinate(edge: object) -> bool:
    is_number = isinstance(edge, Real) and not isinstance(edge, bool)
    return is_number and abs(edge) < 2**63  # type: ignore[arg-type]  # which NaN is not


def _list_in(row: Mapping[str, Any], column: str, name: str) -> Sequence:
    """The list in a column, or []."""
    value = row.get(column) or []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} has `{column}` {value!r:.80}; expected a list.")
    return value


def _check_name(value: object, found: str) -> None:
    """Refuse a label or an id that is none: what is missing in a table may be NaN, which all rows would share."""
    is_number = isinstance(value, Integral) or (isinstance(value, Real) and math.isfinite(value))
    if value is not None and not is_number and not isinstance(value, str):
        raise ValueError(f"{found} {value!r:.80}; expected a text or a number.")
    if isinstance(value, str):
        check_texts([value], found)


def _check_instructions(instructions: Sequence, num_boxes: int, name: str) -> None:
    for one in instructions:
        box = one.get("box") if isinstance(one, Mapping) else None
        if not isinstance(box, int) or isinstance(box, bool) or not 0 <= box < num_boxes:
            raise ValueError(
                f"{name} has {one!r:.80} in `instructions` and {num_boxes} `boxes`; expected a `text` and the number "
                "of the `box` it names."
            )
        check_texts([one.get("text")], f"{name} has `instructions`")


def _check_edit(row: Mapping[str, Any], name: str) -> None:
    edit = row.get("edit")
    if edit and not isinstance(edit, Mapping):
        raise ValueError(f"{name} has `edit` {edit!r:.80}; expected a mapping with an `instruction`.")
    if edit and edit.get("instruction") is not None:
        check_texts([edit["instruction"]], f"{name} has `edit` with an `instruction`")
    if row.get("edited_image") is None:
        return
    if edit_of(row) is None:
        raise ValueError(f"{name} has an `edited_image`; expected an `edit` with the `instruction` that it came of.")
    if not images_of(row):
        raise ValueError(f"{name} has an `edited_image` and no image; expected those that it came of.")


def check_texts(texts: object, found: str) -> None:
    """Refuse what is no list of texts that say something.

    Args:
        texts: The list.
        found: The beginning of the error, up to the value.

    Raises:
        ValueError: If it is no list, is empty, or one of it is no text, is empty, or has half a surrogate pair.
    """
    if not isinstance(texts, list | tuple):
        raise ValueError(f"{found} {texts!r:.80}; expected text, in a list.")
    if not texts:
        raise ValueError(f"{found} {texts!r}; expected text that is not empty.")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{found} {text!r:.80}; expected text that is not empty.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{found} {ascii(text):.80}; expected text without half a surrogate pair.") from error


def names_of(theirs: str | Sequence[str] | None) -> list[str]:
    """The names that a column of ours has in the data: one, several whose lists are joined, or none."""
    return [] if theirs is None else [theirs] if isinstance(theirs, str) else list(theirs)


def check_columns(present: Collection[str], columns: Mapping[str, ColumnName], name: str) -> None:
    """Refuse data whose columns cannot be those that were meant, before the first row is read.

    Data without images, or without captions, is fine where nothing else could have been meant: a column with an
    unknown name may be the caption that would be missed.

    Args:
        present: The columns of the data.
        columns: For a column of ours the name it has there, a list of several whose lists are joined, or None to say
            that there is none.
        name: The name of the data in errors.

    Raises:
        ValueError: If a column is missing; the error names it, and those that there are.
    """
    shown = ", ".join(sorted(present)) or "none"
    for ours, names in columns.items():
        for theirs in names_of(names):
            if theirs not in present:
                raise ValueError(
                    f"{name} has no column `{theirs}`, which `columns` gives for `{ours}`; it has {shown}."
                )
    named = {*present, *columns} - _all_names(columns)
    kinds = {"image": (*IMAGE_COLUMNS, "file_name"), "captions": (*CAPTION_COLUMNS, "qa", "label")}
    missing = [kind for kind, names in kinds.items() if not named & set(names)]
    for kind in missing:
        if len(missing) == len(kinds) or named - set(COLUMNS):
            raise ValueError(
                f"{name} has no column `{kind}`; it has {shown}. Say which it is with `columns: {{{kind}: NAME}}`, or "
                f"that there is none with `columns: {{{kind}: null}}`."
            )


def map_columns(fields: Mapping[str, Any], columns: Mapping[str, ColumnName], name: str) -> dict[str, Any]:
    """Rename the fields of a row to our columns.

    Args:
        fields: A row as it is stored.
        columns: As for `check_columns`.
        name: The name of the row in errors.

    Raises:
        ValueError: If the row lacks a column that is named there.
    """
    if not columns:
        return dict(fields)
    # Where one kind of captions is chosen, the others are not meant.
    chosen = CAPTION_COLUMNS if set(CAPTION_COLUMNS) & set(columns) else ()
    left_out = {*_all_names(columns), *columns, *chosen}
    row = {column: value for column, value in fields.items() if column not in left_out}
    for ours, theirs in columns.items():
        if isinstance(theirs, str):
            if theirs not in fields:
                raise ValueError(f"{name} has no column `{theirs}`; it has {', '.join(sorted(fields))}.")
            row[ours] = fields[theirs]
        elif theirs is not None:  # of which a row may have some
            lists = [fields[column] for column in theirs if fields.get(column)]
            row[ours] = [one for own in lists for one in ([own] if isinstance(own, str) else own)]
    return row


def _all_names(columns: Mapping[str, ColumnName]) -> set[str]:
    return {name for theirs in columns.values() for name in names_of(theirs)}
