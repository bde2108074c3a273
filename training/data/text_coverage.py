"""How well a tokenizer covers texts: those in a language that it does not know are spelled in bytes, or lost."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mmgem.training.data.rows import LANGUAGE_PREFIX, captions_of

logger = logging.getLogger(__name__)

MOST_TOKENS = 1.0  # for a character: with more of them characters are spelled in bytes
MOST_UNKNOWN = 0.05  # of all tokens
TEXTS_READ = 200  # of each column
_COLUMNS = ("queries", "region_captions")


class Coverage(NamedTuple):
    """How texts are cut into tokens.

    Args:
        tokens_per_character: Tokens for each character.
        unknown: The share of tokens that stand for anything unknown.
    """

    tokens_per_character: float
    unknown: float

    @property
    def is_enough(self) -> bool:
        """Whether a model can learn to read and to write the texts."""
        return self.tokens_per_character <= MOST_TOKENS and self.unknown <= MOST_UNKNOWN


def measure_coverage(tokenizer, texts: Sequence[str]) -> Coverage:
    """Measure how a tokenizer cuts texts.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: The texts.
    """
    ids = [token for own in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for token in own]
    characters = sum(map(len, texts))
    unknown = 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
    return Coverage(len(ids) / max(1, characters), unknown / max(1, len(ids)))


def warn_uncovered(tokenizer, rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, Coverage]:
    """Warn of columns whose language a tokenizer does not cover.

    Args:
        tokenizer: A tokenizer of transformers.
        rows: Their columns; images need not be loaded.
        name: The name of the data in the warning.

    Returns:
        The coverage of `captions`, `queries`, `region_captions` and of every column `captions_LANGUAGE` that has
        texts, by its first ones.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        columns = {column: row[column] for column in row if column in _COLUMNS or column.startswith(LANGUAGE_PREFIX)}
        for column, own in {"captions": captions_of(row), **columns}.items():
            if len(texts[column]) < TEXTS_READ:
                own = own if isinstance(own, list | tuple) else []
                texts[column] += [text for text in own if isinstance(text, str) and _is_readable(text)]
    measured = {column: measure_coverage(tokenizer, own) for column, own in texts.items() if own}
    for column, coverage in measured.items():
        if not coverage.is_enough:
            logger.warning(
                "`%s` of %s has %.1f tokens for each character, and %.0f%% unknown ones; expected at most %g and "
                "%.0f%%. The tokenizer does not cover its language, so that texts are long and hard to learn.",
                column,
                name,
                coverage.tokens_per_character,
                100 * coverage.unknown,
                MOST_TOKENS,
                100 * MOST_UNKNOWN,
            )
    return measured


def _is_readable(text: str) -> bool:
    """Whether a row with it is read: half a surrogate pair is no text."""
    return bool(text.strip()) and not any("\ud800" <= character <= "\udfff" for character in text)
