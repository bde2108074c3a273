"""What is said about scenes is true, complete and varied, and reading it gives the objects back."""

import re
from collections import Counter

import pytest

from mmgem.training.scenes.caption_parser import parse_caption, parse_region_caption
from mmgem.training.scenes.captions import (
    LONG_CAPTION_WORDS,
    label_prompt,
    write_captions,
    write_edit,
    write_hard_negatives,
    write_instructions,
    write_long_caption,
    write_qa,
    write_region_captions,
)
from mmgem.training.scenes.drawing import COLORS, PLACES, SHAPES, Look, SceneObject, make_scene

SCENES = [make_scene(21, index) for index in range(500)]

STAR = SceneObject("star", "red", "solid", "small", "top left")
MOON = SceneObject("moon", "purple", "striped", "large", "center")
CROSS = SceneObject("cross", "orange", "outlined", "small", "bottom")


def test_captions_read_back():
    for scene in SCENES:
        captions = write_captions(scene)
        assert len(set(captions)) == len(captions) in (3, 4)
        for caption in captions:
            assert parse_caption(caption) == frozenset(scene.objects), caption
            assert re.fullmatch(r"[a-z ,]+[a-z]", caption)
            assert len(caption.split()) <= 11 * len(scene.objects) + 2


def test_captions_are_varied():
    starts = {caption.split()[0] for scene in SCENES for caption in write_captions(scene)}
    assert starts == {"a", "an", "at", "in", "on"}
    text = " ".join(caption for scene in SCENES for caption in write_captions(scene))
    for phrase in (
        "with stripes",
        "plus sign",
        "crescent",
        "disc",
        "hollow",
        "in the middle",
        "upper left corner",
        "big",
    ):
        assert phrase in text


def test_texts_repeat():
    for write in (
        write_captions,
        write_long_caption,
        write_region_captions,
        write_qa,
        write_hard_negatives,
        write_instructions,
        write_edit,
    ):
        assert write(SCENES[0]) == write(make_scene(21, 0))


def test_long_captions_tell_the_objects_in_their_last_third():
    for scene in SCENES:
        text = write_long_caption(scene)
        words = text.split()
        assert LONG_CAPTION_WORDS[0] <= len(words) <= LONG_CAPTION_WORDS[1]
        assert parse_caption(text) == frozenset(scene.objects), text
        last_third = " ".join(words[-(len(words) // 3) :])
        told = text.split(":")[1].strip()
        assert last_third.endswith(told)
        assert parse_caption(text.split(":")[0]) is None  # the remarks speak of no object


def test_long_captions_do_not_tell_scenes_apart_before():
    openings = [write_long_caption(scene).split(":")[0] for scene in SCENES]
    sentences = {sentence.strip() for opening in openings for sentence in opening.split(".")}
    assert len(sentences) < 40


def test_region_captions_read_back():
    for scene in SCENES:
        captions = write_region_captions(scene)
        assert [parse_region_caption(caption) for caption in captions] == [item.look for item in scene.objects]
        assert all(parse_caption(caption) is None for caption in captions)  # no place


def test_hard_negatives_are_wrong_by_one_attribute():
    for scene in SCENES:
        truth = frozenset(scene.objects)
        negatives = write_hard_negatives(scene)
        assert len(negatives) == 3
        for negative in negatives:
            said = parse_caption(negative)
            assert said is not None and said != truth
            (wrong,), (right,) = said - truth, truth - said
            differing = [name for name in SceneObject.__slots__ if getattr(wrong, name) != getattr(right, name)]
            assert len(differing) == 1
    counts = [len(set(map(parse_caption, write_hard_negatives(scene)))) for scene in SCENES]
    assert set(counts) == {3}


def test_answers_are_true():
    """Each question is answered here in another way: by its words, from the objects."""
    numbers = {word: number for number, word in enumerate(("zero", "one", "two", "three", "four", "five"))}
    answers = set()
    for scene in SCENES:
        pairs = write_qa(scene)
        assert len(pairs) == 5
        for pair in pairs:
            question, answer = pair["question"], pair["answer"]
            answers.add(answer)
            place = _place_in(question)
            there = [item for item in scene.objects if item.place == place]
            if question.startswith("what color"):
                assert answer == there[0].color and there[0].shape in question
            elif question.startswith("what is"):
                assert answer.split()[1:] == [there[0].color, there[0].shape] if there else answer == "nothing"
            elif question.startswith("where"):
                (item,) = _matching(scene, question)
                assert _place_in(answer) == item.place
            elif question.startswith("how many"):
                assert numbers[answer] == len(_matching(scene, question))
            else:
                assert answer == ("yes" if _matching(scene, question) else "no")
    assert {"yes", "no", "nothing", "zero", "five", "red", "in the center"} <= answers


def _place_in(text: str) -> str | None:
    return max((place for place in PLACES if re.search(rf"the {place}\b", text)), key=len, default=None)


def _matching(scene, question):
    found = [item for item in scene.objects if item.size == "large" or "large" not in question]
    for name, values in (("shape", SHAPES), ("color", COLORS)):
        said = [value for value in values if re.search(rf"\b{value}(s|es)?\b", question)]
        if said:
            found = [item for item in found if getattr(item, name) == said[0]]
    return found


def test_instructions_mean_one_object_and_no_other():
    kinds = Counter()
    for scene in SCENES:
        instructions = write_instructions(scene)
        assert [one["box"] for one in instructions] == list(range(len(scene.objects)))
        for item, one in zip(scene.objects, instructions, strict=True):
            words = one["text"].removeprefix("the ")
            if words.startswith("object "):
                # Read as a caption of an object that stands there.
                (read,) = parse_caption("a red star " + words.removeprefix("object "))
                kind, meant = "place", [other for other in scene.objects if other.place == read.place]
            elif words.endswith(" object"):
                look = parse_region_caption(words.replace("object", "star"))
                kind, meant = "color", [other for other in scene.objects if other.color == look.color]
            else:
                look = parse_region_caption(f"red {words}")
                kind, meant = "shape", [other for other in scene.objects if other.shape == look.shape]
            assert meant == [item]
            kinds[kind] += 1
    assert min(kinds[kind] for kind in ("place", "color", "shape")) > 200


def test_edits_do_what_they_say():
    edits = [(scene, write_edit(scene)) for scene in SCENES]
    done = [(scene, *edit) for scene, edit in edits if edit is not None]
    assert 0.7 < len(done) / len(edits) < 0.95
    verbs = set()
    for scene, instruction, twin in done:
        before, after = set(scene.objects), set(twin.objects)
        gone, new = before - after, after - before
        verbs.add(instruction.split()[0])
        assert (twin.seed, twin.index) == (scene.seed, scene.index)
        assert [item.size for item in twin.objects].count("large") == 1
        assert [PLACES.index(item.place) for item in twin.objects] == sorted({PLACES.index(o.place) for o in after})
        if instruction.startswith("add"):
            assert not gone and parse_caption(instruction.removeprefix("add ")) == new
        elif instruction.startswith("remove"):
            (item,) = gone
            assert not new and item.shape in instruction and f"the {item.place}" in instruction
        else:
            (old,), (changed,) = gone, new
            (attribute,) = [name for name in SceneObject.__slots__ if getattr(old, name) != getattr(changed, name)]
            assert instruction.endswith(getattr(changed, attribute)) and f"{old.shape} " in instruction
            assert attribute == {"turn": "shape", "move": "place"}.get(instruction.split()[0], attribute)
    assert verbs == {"add", "remove", "turn", "make", "move"}


@pytest.mark.parametrize(
    "text",
    [
        "a red star at the top left",
        "A Red Star, at the top left.",
        "at the top left a red star",
        "In the top-left corner there is a small, solid red star!",
        "a picture of one tiny filled red star on the upper left",
        "the little solid red star, upper left",
        "a small red star can be seen in the top left corner of the image",
    ],
)
def test_other_wordings_of_one_object(text):
    assert parse_caption(text) == {STAR}


@pytest.mark.parametrize(
    "text",
    [
        "a red star, top left, a big violet crescent with stripes in the middle and a hollow orange plus at bottom",
        "a large striped purple moon in the centre, an outlined orange cross at the lower edge, a red star upper left",
        "in the center a stripy huge purple crescent moon; at the bottom an empty orange cross; top left a red star",
        "red star at the top left. a large striped purple moon in the middle. at bottom an orange cross in outline",
        "at the bottom an outlined orange cross, a red star at the top left in the center a big striped purple moon",
    ],
)
def test_other_wordings_of_three_objects(text):
    assert parse_caption(text) == {STAR, MOON, CROSS}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing in it moves.",
        "a red star",  # no place
        "a star at the top left",  # no color
        "a red at the top left",  # no shape
        "at the top left",
        "a red blue star at the top left",
        "a red star moon at the top left",
        "a striped red star with stripes at the top left",
        "a small large red star at the top left",
        "a red star at the top left, a blue moon at the top left",
        "a red star at the top left, a blue moon",
        "a red star at the top left, a blue moon at the top, at the bottom",
        "a red blob at the top left",
        "a red star at the top left, a green dog in the center",
        "a red star at the top left, a green thing in the center",
        "no red star at the top left",
        "two red stars at the top left",
        "a red star left of the blue moon in the center",
        "a red star at the top left. a gray star at the top.",
    ],
)
def test_what_cannot_be_read_completely_is_refused(text):
    assert parse_caption(text) is None


def test_region_captions_in_other_words():
    assert parse_region_caption("The big, striped violet crescent.") == MOON.look
    assert parse_region_caption("a picture with a large red star") == Look("star", "red", "solid", "large")
    for text in ("", "star", "a red star at the top", "a red star and a blue moon", "a red thing", "on the left"):
        assert parse_region_caption(text) is None


def test_label_prompt():
    assert parse_region_caption(label_prompt("blue heart")) == Look("heart", "blue", "solid", "large")
