"""Checks of a section of a recipe, which holds the arguments of a function or class, against their signature."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from huggingface_hub.dataclasses import type_validator

_LISTED = 20  # names of which an error message may list all


def check_keys(section: object, known: Iterable[str], where: str) -> None:
    """Refuse a section that is no mapping or has a key that nothing reads.

    Args:
        section: The section as read from the recipe.
        known: The keys it may have.
        where: The name of the section in error messages.

    Raises:
        ValueError: If it is; the error names the key and the nearest known one.
    """
    known = list(known)
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} is {section!r:.80}; expected a mapping with keys such as {', '.join(known[:3])}.")
    for key in section:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            expected = f"; expected {', '.join(known)}." if len(known) <= _LISTED else "."
            hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
            raise ValueError(f"{where} has the unknown key `{key}`{expected}{hint}")


def check_type(value: Any, annotation: Any, where: str) -> None:
    """Refuse a value of a wrong type; a whole number will do where a `float` is expected.

    Args:
        value: Any value.
        annotation: The type it should have.
        where: The name of the value in error messages.

    Raises:
        ValueError: If it has another type.
    """
    for candidate in (value, _with_points(value)):
        try:
            return type_validator(where, candidate, annotation)
        except TypeError:
            continue
    name = annotation.__name__ if isinstance(annotation, type) else re.sub(r"\w+\.", "", str(annotation))
    raise ValueError(f"{where} is {value!r:.80}; expected {name}.")


def _with_points(value: Any) -> Any:
    """Whole numbers as floats, also in a mapping."""
    if isinstance(value, Mapping):
        return {name: _with_points(item) for name, item in value.items()}
    is_whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023
    return float(value) if is_whole else value


def check_arguments(
    section: object, function: Callable, where: str, given: Iterable[str] = (), rest: Callable | None = None
) -> None:
    """Refuse a section that cannot be the keyword arguments of a function, or of a class.

    Args:
        section: The section as read from the recipe.
        function: A function or class with annotated parameters; those without an annotation take anything.
        where: The name of the section in error messages.
        given: Parameters that do not come from the section.
        rest: The function that gets further keyword arguments (`**`), if any are taken.

    Raises:
        ValueError: If a key is no parameter, a value has a wrong type, or an argument is missing.
    """
    taken, hints = set(given), _hints(function)
    parameters = {name: it for name, it in inspect.signature(function).parameters.items() if name not in taken}
    if rest is not None:
        parameters = {name: it for name, it in parameters.items() if it.kind != it.VAR_KEYWORD}
        parameters = {**inspect.signature(rest).parameters, **parameters}
        hints = _hints(rest) | hints
    check_keys(section, parameters, where)
    assert isinstance(section, Mapping)
    for name, value in section.items():
        if name in hints:
            check_type(value, hints[name], f"`{name}` in {where}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in section:
            raise ValueError(f"{where} has no `{name}`; expected a value for it.")


def _hints(function: Callable) -> dict[str, Any]:
    """The annotations of the parameters: a dataclass has them itself, other classes at their `__init__`."""
    is_plain_class = inspect.isclass(function) and not is_dataclass(function)
    return get_type_hints(function.__init__ if is_plain_class else function)  # type: ignore[misc]
