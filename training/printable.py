"""Names of files and texts of models as they are printed: nothing in them steers a terminal; and numbers of things."""

import unicodedata

# Characters that end a line, or turn the direction of those after them; beside control codes and halves of characters.
_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}
_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def printable(text: str) -> str:
    """Returns a text in one line, with escapes such as `\\\\x1b` for what would steer a terminal."""
    return "".join(one.encode("unicode_escape").decode() if _steers(one) else one for one in text)


def counted(count: int, one: str, several: str = "") -> str:
    """Returns a number of things, such as "1 image" or "6,086 images"; `several` is a plural of another kind."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def is_utf8(name: str) -> bool:
    """Whether the name of a file is UTF-8, and can be kept, also by the libraries that are given it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _CATEGORIES or unicodedata.bidirectional(character) in _DIRECTIONS
