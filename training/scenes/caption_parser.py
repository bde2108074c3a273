"""The way back from a caption to the objects it speaks of.

`parse_caption` and `parse_region_caption` understand all that `captions` writes and reasonable other wordings of it
(synonyms, other order, articles, punctuation, case). They refuse everything else, so that a generated caption in words
of its own can be judged right or wrong.
"""

import re

from mmgem.training.scenes.captions import WORDS
from mmgem.training.scenes.drawing import Look, SceneObject


def parse_caption(text: str) -> frozenset[SceneObject] | None:
    """The objects a caption speaks of, each with all its attributes.

    An object is a noun phrase next to a place, in either order. A fill that is not named is solid, a size that is not
    named is small. Sentences in which nothing describes an object are passed over, as in long captions.

    Args:
        text: Short or long caption; case, articles and punctuation do not matter.

    Returns:
        The objects, or None where the text is not a caption that can be read completely: a word outside the grammar in
        a sentence about objects, an object without color, shape or place, one with two of the same, a place with two
        objects, or no object at all.
    """
    objects: dict[str, SceneObject] = {}
    for sentence in _read(text):
        if sentence is None or len(sentence) % 2:
            return None
        for pair in zip(sentence[::2], sentence[1::2], strict=True):
            look, place = pair if isinstance(pair[0], Look) else pair[::-1]
            if not isinstance(look, Look) or isinstance(place, Look) or place in objects:
                return None
            objects[place] = SceneObject(*look, place)
    return frozenset(objects.values()) or None


def parse_region_caption(text: str) -> Look | None:
    """The object a region caption speaks of, or None where the text is not a noun phrase of exactly one object."""
    sentences = _read(text)
    if len(sentences) == 1 and sentences[0] is not None and len(sentences[0]) == 1:
        look = sentences[0][0]
        return look if isinstance(look, Look) else None
    return None


def _lexicon() -> dict[str, tuple[str, str]]:
    """Every phrase that can be read, with its kind and value. Kind "filler" carries no meaning."""
    lexicon: dict[str, tuple[str, str]] = {}
    for kind in ("shape", "color", "fill", "size"):
        for value, words in WORDS[kind].items():
            lexicon |= {word: (kind, value) for word in words if word}
    synonyms = {
        "shape": {
            "circle": "disk dot ball",
            "cross": "plus",
            "moon": "crescent_moon",
            "diamond": "lozenge",
        },
        "fill": {"solid": "filled", "striped": "stripy stripey", "outlined": "outline empty unfilled"},
        "size": {"large": "huge", "small": "tiny"},
    }
    for kind, synonyms_of in synonyms.items():
        for value, phrases in synonyms_of.items():
            lexicon |= {phrase.replace("_", " "): (kind, value) for phrase in phrases.split()}
    lexicon |= {"with stripes": ("fill after", "striped"), "in outline": ("fill after", "outlined")}

    middles = ("center", "centre", "middle")
    rows = {"top": ("top", "upper"), "": middles, "bottom": ("bottom", "lower")}
    columns = {"left": ("left",), "": middles, "right": ("right",)}
    for row, row_words in rows.items():
        for column, column_words in columns.items():
            place = f"{row} {column}".strip() or "center"
            names = [f"{one} {other}" for one in row_words for other in column_words]
            if row and column:
                names += [f"{name} corner" for name in names]
            elif row or column:
                names += [row or column]
                words = row_words if row else column_words
                names += [f"{word} {part}" for word in words for part in ("edge", "side")]
                names += [f"{other} {one}" for one in row_words for other in column_words]
            else:
                names = list(middles)
            lexicon |= {name: ("place", place) for name in names}

    fillers = (
        "a an the one and also with at in on there is are this it shows you see can be seen here located placed "
        "of_the_picture of_the_image of_the_scene of_it a_picture_of a_picture_with "
        "an_image_of an_image_with as_well_as"
    )
    return lexicon | {word.replace("_", " "): ("filler", "") for word in fillers.split()}


_LEXICON = _lexicon()
_TOKEN = re.compile(rf"\b(?:{'|'.join(sorted(_LEXICON, key=len, reverse=True))})\b|[^\s,]+")


def _read(text: str) -> list[list[Look | str] | None]:
    """The looks and places of each sentence that has any, in order; None for a sentence that cannot be read."""
    sentences = []
    for sentence in re.split(r"[.:;!?\n]", text.lower().replace("-", " ")):
        tokens = _TOKEN.findall(" ".join(sentence.replace(",", " , ").split()))
        meanings = [_LEXICON.get(token) for token in tokens]
        if any(meaning is not None and meaning[0] != "filler" for meaning in meanings):
            known = [meaning for meaning in meanings if meaning is not None]
            sentences.append(_read_sentence(known) if len(known) == len(meanings) else None)
    return sentences


def _read_sentence(meanings: list[tuple[str, str]]) -> list[Look | str] | None:
    found: list[dict[str, str] | str] = []  # a noun phrase as its attributes, or a place
    open_phrase: dict[str, str] = {}  # the noun phrase that still waits for its noun
    for kind, value in meanings:
        if kind == "fill after":
            phrases = [item for item in found if isinstance(item, dict)]
            if open_phrase or not phrases or "fill" in phrases[-1]:
                return None
            phrases[-1]["fill"] = value
        elif kind == "place":
            if open_phrase:
                return None
            found.append(value)
        elif kind != "filler":
            if kind in open_phrase:
                return None
            open_phrase[kind] = value
            if kind == "shape":
                if "color" not in open_phrase:
                    return None
                found.append(open_phrase)
                open_phrase = {}
    if open_phrase:
        return None
    unsaid = {"fill": "solid", "size": "small"}
    return [item if isinstance(item, str) else Look(**{**unsaid, **item}) for item in found]
