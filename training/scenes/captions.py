"""The texts about a scene: captions, questions, instructions, edits.

Every text follows from the scene alone, wording included. A caption is complete: it names every object with color,
shape and place; a fill is named unless the object is solid, a size unless it is small.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mmgem.training.scenes.drawing import (
    COLORS,
    FILLS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    Look,
    Scene,
    SceneObject,
)

# The first word of a tuple is the plain one; a repeated word is chosen more often; "" leaves the attribute unsaid.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {shape: (shape,) for shape in SHAPES}
    | {
        "circle": ("circle", "circle", "disc"),
        "cross": ("cross", "cross", "plus sign"),
        "diamond": ("diamond", "diamond", "rhombus"),
        "moon": ("moon", "moon", "crescent"),
    },
    "color": {color: (color,) for color in COLORS} | {"purple": ("purple", "purple", "violet")},
    "fill": {
        "solid": ("", "", "", "", "", "", "", "solid"),
        "striped": ("striped", "striped", "striped", "with stripes"),
        "outlined": ("outlined", "hollow"),
    },
    "size": {"large": ("large", "big"), "small": ("", "", "", "", "", "", "small", "little")},
    "place": {
        f"{row} {column}": (f"at the {row} {column}",) * 3 + (f"in the {height} {column} corner",)
        for row, height in (("top", "upper"), ("bottom", "lower"))
        for column in ("left", "right")
    }
    | {
        "top": ("at the top", "at the top", "at the upper edge"),
        "left": ("on the left", "at the left", "at the left edge"),
        "center": ("in the center", "in the middle"),
        "right": ("on the right", "at the right", "at the right edge"),
        "bottom": ("at the bottom", "at the bottom", "at the lower edge"),
    },
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five")

_OPENINGS = {
    "plain": "this is a simple drawing on a calm, dark ground.",
    "gradient": "this is a simple drawing on a dark ground that slowly grows lighter.",
    "checkers": "this is a simple drawing on a dark ground with a faint checkered pattern.",
    "dots": "this is a simple drawing on a dark ground with rows of faint specks.",
    "noise": "this is a simple drawing on a dark ground with a cloudy grain.",
}
# True of every scene, and free of any word that describes an object. Those of 8 words or less have 123 words together,
# so that `write_long_caption` never runs out of them.
_REMARKS = (
    "nothing in it moves.",
    "no person or animal can be seen.",
    "there is no writing anywhere in it.",
    "the light is even and casts no shadows.",
    "every form is cut cleanly from its surroundings.",
    "nobody has signed the picture.",
    "it was made to be looked at calmly.",
    "each thing keeps to its own spot.",
    "nothing hides behind anything else.",
    "the mood is quiet and a bit playful.",
    "it could hang in a bright kitchen.",
    "the edges are crisp throughout.",
    "a child might describe it without any trouble.",
    "the whole has the charm of a game.",
    "it tells no story of its own.",
    "the view is flat, as on paper.",
    "no frame runs around the picture.",
    "one glance is enough to take it in.",
    "pictures like this one follow a few simple rules and nothing else.",
    "the ground behind the things stays calm, so that the eye is never led astray.",
    "whoever made it cared about clear forms more than about fine detail.",
    "there is plenty of room around the things, and none of them touches another.",
    "it would be easy to draw again from memory after a short look.",
    "one could imagine it on a card, a poster or the cover of a notebook.",
    "the paint lies evenly, and no brush marks can be found in it.",
    "it is hard to say how old it is or where it was made.",
)
_TURNS = (
    "in full, it shows the following:",
    "named one by one, the things are these:",
    "here is all that can be seen in it:",
)
LONG_CAPTION_WORDS = (105, 130)


def write_captions(scene: Scene) -> list[str]:
    """3 or 4 different short captions, each true and complete: lower case, ASCII, no final period."""
    rng = scene.random("captions")
    styles = rng.sample(_STYLES, len(_STYLES))
    captions: dict[str, None] = {}
    count = rng.randint(3, 4)
    while len(captions) < count:
        captions[styles[len(captions) % len(styles)](scene.objects, rng)] = None
    return list(captions)


def write_long_caption(scene: Scene) -> str:
    """A caption of 105 to 130 words: remarks true of any scene, then, in the last third, the objects."""
    rng = scene.random("long caption")
    style = rng.choice((_in_reading_order, _place_first))
    objects = style(scene.objects, None) + "."
    turn = rng.choice(_TURNS)
    told = _count_words(objects)  # 41 at most
    prose = [_OPENINGS[scene.background]]
    words = _count_words(prose[0]) + _count_words(turn)
    # The objects are at most a third of all words. No remark of 8 words leads from below `fewest` to above `most`.
    fewest, most = max(2 * told, LONG_CAPTION_WORDS[0] - told), LONG_CAPTION_WORDS[1] - told
    for remark in rng.sample(_REMARKS, len(_REMARKS)):
        if words >= fewest:
            break
        if words + _count_words(remark) <= most:
            prose.append(remark)
            words += _count_words(remark)
    return " ".join([*prose, turn, objects])


def write_region_captions(scene: Scene) -> list[str]:
    """One noun phrase for each object, in order, without its place: "a large striped red star"."""
    return [_noun_phrase(item.look, scene.random(f"region {item.place}")) for item in scene.objects]


def write_qa(scene: Scene) -> list[dict[str, str]]:
    """5 questions with short answers: a color, a thing, a place, a count, and one of yes or no."""
    rng = scene.random("qa")
    item = rng.choice(scene.objects)
    pairs = [(f"what color is the {item.shape} {_plain('place', item.place)}?", item.color)]

    filled = {item.place: item for item in scene.objects}
    place = rng.choice([*filled, rng.choice(PLACES)])
    answer = _with_article(f"{filled[place].color} {filled[place].shape}") if place in filled else "nothing"
    pairs.append((f"what is {_plain('place', place)}?", answer))

    names = Counter(f"{item.color} {item.shape}" for item in scene.objects)
    unique = [item for item in scene.objects if names[f"{item.color} {item.shape}"] == 1]
    if unique:
        item = rng.choice(unique)
        pairs.append((f"where is the {item.color} {item.shape}?", _plain("place", item.place)))
    else:
        pairs.append(("where is the large object?", _plain("place", scene.subject.place)))

    kind = rng.choice(("object", "color", "shape"))
    if kind == "object":
        pairs.append(("how many objects are there?", _NUMBERS[len(scene.objects)]))
    else:
        # A random value is mostly absent: half of the time one that is there is asked for.
        present = getattr(rng.choice(scene.objects), kind)
        value = rng.choice((present, rng.choice(COLORS if kind == "color" else SHAPES)))
        plural = f"{value} objects" if kind == "color" else f"{value}es" if value == "cross" else f"{value}s"
        count = sum(getattr(item, kind) == value for item in scene.objects)
        pairs.append((f"how many {plural} are there?", _NUMBERS[count]))

    if rng.random() < 0.5:
        pairs.append((f"is there {_with_article(rng.choice(list(names)))}?", "yes"))
    else:
        absent = [f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" not in names]
        pairs.append((f"is there {_with_article(rng.choice(absent))}?", "no"))
    return [{"question": question, "answer": answer} for question, answer in pairs]


def write_hard_negatives(scene: Scene) -> list[str]:
    """3 captions that are false of the scene by exactly one attribute of one object."""
    rng = scene.random("hard negatives")
    captions = []
    for attribute in rng.sample(("shape", "color", "fill", "size", "place"), 3):
        item = rng.choice(scene.objects)
        changed = replace(item, **{attribute: _other_value(scene, item, attribute, rng)})
        captions.append(rng.choice(_STYLES)(_exchange(scene.objects, item, changed), rng))
    return captions


def write_instructions(scene: Scene) -> list[dict[str, Any]]:
    """For each object, in order, words that mean no other, by its place, color or shape: "the red object".

    Returns:
        `{"text": ..., "box": ...}` each, with the number of the object.
    """
    instructions = []
    for number, item in enumerate(scene.objects):
        rng = scene.random(f"instruction {item.place}")
        kinds = [
            kind
            for kind in ("place", "color", "shape")
            if sum(getattr(other, kind) == getattr(item, kind) for other in scene.objects) == 1
        ]
        kind = rng.choice(kinds)  # there is one: no two objects have the same place
        words = _say(kind, getattr(item, kind), rng)
        text = {"place": f"the object {words}", "color": f"the {words} object", "shape": f"the {words}"}[kind]
        instructions.append({"text": text, "box": number})
    return instructions


class Edit(NamedTuple):
    """An instruction and the scene that follows from it; background and all other objects stay as they are."""

    instruction: str
    twin: Scene


def write_edit(scene: Scene) -> Edit | None:
    """An edit of the scene, or None for about one scene in six. The subject is never removed."""
    rng = scene.random("edit")
    if rng.random() < 1 / 6:
        return None
    item = rng.choice(scene.objects)
    actions = ["shape", "color", "fill", "place"]
    if item.size == "small":
        actions.append("remove")
    if len(scene.objects) < MAX_OBJECTS:
        actions.append("add")
    action = rng.choice(actions)
    where = _plain("place", item.place)
    if action == "remove":
        return Edit(f"remove the {item.shape} {where}", replace(scene, objects=_exchange(scene.objects, item, None)))
    if action == "add":
        place = _other_value(scene, item, "place", rng)
        new = SceneObject(rng.choice(SHAPES), rng.choice(COLORS), rng.choice(FILLS), "small", place)
        instruction = f"add {_noun_phrase(new.look, rng)} {_say('place', place, rng)}"
        return Edit(instruction, replace(scene, objects=_in_order([*scene.objects, new])))
    value = _other_value(scene, item, action, rng)
    instruction = {
        "shape": f"turn the {item.color} {item.shape} {where} into a {value}",
        "color": f"make the {item.shape} {where} {value}",
        "fill": f"make the {item.shape} {where} {value}",
        "place": f"move the {item.shape} {where} to the {value}",
    }[action]
    changed = replace(item, **{action: value})
    return Edit(instruction, replace(scene, objects=_exchange(scene.objects, item, changed)))


def label_prompt(label: str) -> str:
    """The text that searches for the scenes of a class, one of `LABELS`: "a picture with a large red star"."""
    return f"a picture with a large {label}"


def _in_reading_order(objects: Sequence[SceneObject], rng: random.Random | None) -> str:
    """ "a red star at the top left, a blue moon in the center and ..." """
    return _join([f"{_noun_phrase(item.look, rng)} {_say('place', item.place, rng)}" for item in objects], rng)


def _subject_first(objects: Sequence[SceneObject], rng: random.Random | None) -> str:
    """ "a large red star in the center, with a blue moon at the top left and ..." """
    phrases = [
        f"{_noun_phrase(item.look, rng)} {_say('place', item.place, rng)}"
        for item in sorted(objects, key=lambda item: item.size != "large")
    ]
    return ", with ".join([phrases[0], _join(phrases[1:], rng)][: len(phrases)])


def _place_first(objects: Sequence[SceneObject], rng: random.Random | None) -> str:
    """ "at the top left a red star, in the center a blue moon, ..." """
    return ", ".join(f"{_say('place', item.place, rng)} {_noun_phrase(item.look, rng)}" for item in objects)


_STYLES = (_in_reading_order, _subject_first, _place_first)


def _noun_phrase(look: Look, rng: random.Random | None) -> str:
    fill = _say("fill", look.fill, rng)
    before, after = ("", fill) if fill.startswith("with ") else (fill, "")
    size, color, shape = (_say(kind, getattr(look, kind), rng) for kind in ("size", "color", "shape"))
    return _with_article(" ".join(filter(None, (size, before, color, shape, after))))


def _with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _say(kind: str, value: str, rng: random.Random | None) -> str:
    """A wording of an attribute; without `rng`, the plain one."""
    return _plain(kind, value) if rng is None else rng.choice(WORDS[kind][value])


def _plain(kind: str, value: str) -> str:
    return WORDS[kind][value][0]


def _join(phrases: list[str], rng: random.Random | None) -> str:
    """Phrases with commas between; without `rng` no "and", which would make the plain wording longer."""
    if rng is None or len(phrases) < 2:
        return ", ".join(phrases)
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _count_words(text: str) -> int:
    return len(text.split())


def _other_value(scene: Scene, item: SceneObject, attribute: str, rng: random.Random) -> str:
    """A value of the attribute that the object does not have; for a place, one where nothing is."""
    if attribute == "place":
        taken = {other.place for other in scene.objects}
    else:
        taken = {getattr(item, attribute)}
    values = {"shape": SHAPES, "color": COLORS, "fill": FILLS, "size": SIZES, "place": PLACES}[attribute]
    return rng.choice([value for value in values if value not in taken])


def _exchange(objects: Sequence[SceneObject], old: SceneObject, new: SceneObject | None) -> tuple[SceneObject, ...]:
    """The objects with one exchanged, or taken away if `new` is None."""
    return _in_order([item for item in objects if item != old] + ([new] if new else []))


def _in_order(objects: Sequence[SceneObject]) -> tuple[SceneObject, ...]:
    return tuple(sorted(objects, key=lambda item: PLACES.index(item.place)))
