"""The files that patterns in a recipe mean."""

import glob
import re

_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand_paths(patterns: str | list[str], where: str) -> list[str]:
    """Find the files that patterns mean, in order: `*`, `**` and `?` as in a shell, and `{000..099}` for numbers.

    Args:
        patterns: One pattern, or several.
        where: The name of the patterns in error messages.

    Raises:
        FileNotFoundError: If there is no file for a pattern.
    """
    paths: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expanded = [pattern]
        while match := _NUMBERS.search(expanded[0]):
            numbers = range(int(match[1]), int(match[2]) + 1)
            texts = [f"{number:0{len(match[1])}d}" for number in numbers]
            expanded = [_NUMBERS.sub(text, path, count=1) for path in expanded for text in texts]
        for path in expanded:
            found = sorted(glob.glob(path, recursive=True))
            if not found:
                raise FileNotFoundError(f"{where} is {path!r}, where there is no file; expected one or more.")
            paths += found
    return paths
