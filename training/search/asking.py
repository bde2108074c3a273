"""Captions of the images of an index, and answers about them, from their memories: the files may be gone."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmgem.training.inference import answer_from_memory
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.items import WHOLE_IMAGES
from mmgem.training.search.row_search import RowSearch, check_says_something

BATCH_SIZE = 32


class Answer(NamedTuple):
    """A text of the model about one image.

    Args:
        path: The image file, which may be gone.
        text: The caption or answer.
        score: How near the image is to what was searched for, -1 to 1; None where nothing was.
    """

    path: Path
    text: str
    score: float | None


def ask(
    index: SearchIndex,
    question: str | None = None,
    images: Sequence[str | Path] | None = None,
    search: str | None = None,
    top: int = 1,
    prompt: str | None = None,
) -> list[Answer]:
    """Asks about images of an index that was built with memory (CoMa's compressed tokens as a store,
    https://arxiv.org/abs/2511.08480). No image is read and the vision tower does not run.

    Args:
        index: The index.
        question: By default each image is captioned.
        images: Which ones: names as in the index, or paths of files that are or were in its folder.
        search: Instead, a text that finds them.
        top: How many it finds.
        prompt: Name of the model's prompt that is put before `search`.

    Returns:
        An answer for each image, in the order given, or the nearest first.

    Raises:
        ValueError: If not exactly one of `images` and `search` is given, if an image is not in the index, if the
            index has no memory, for an empty question, and as `SearchIndex.search`.
    """
    check_askable(index, question, images, search, prompt)
    scores: list[float | None]
    if images is not None:
        rows, scores = index.rows_of_images(images), [None] * len(images)
    else:
        kinds = set(WHOLE_IMAGES) & set(index.rows["kind"])
        hits = index.search(search, top=top, prompt=prompt, kinds=kinds)
        rows, scores = [hit.row for hit in hits], [hit.score for hit in hits]
    texts: list[str] = []
    for start in range(0, len(rows), BATCH_SIZE):
        memory = index.memory(rows[start : start + BATCH_SIZE])  # (B, J, H)
        questions = None if question is None else [question] * len(memory)
        texts += answer_from_memory(index.model, index.processor, memory, questions)
    return [Answer(index.path(row), text, score) for row, text, score in zip(rows, texts, scores, strict=True)]


def check_askable(
    index: RowSearch,
    question: str | None,
    images: Sequence[str | Path] | None,
    search: str | None,
    prompt: str | None,
) -> None:
    """Refuses what `ask` cannot answer, as far as it is known without a model; arguments and errors are its own."""
    if (images is None) == (search is None):
        given = "None" if images is None else "given"
        raise ValueError(f"`images` and `search` are both {given}; expected one of them.")
    if question is not None and not question.strip():
        raise ValueError(f"`question` is {question!r}; expected one, or None for captions.")
    if images is not None and prompt is not None:
        raise ValueError(f"`prompt` is {prompt!r}, but there is no `search` for it to stand before; expected None.")
    if images is not None:
        index.rows_of_images(images)
    if search is not None:
        check_says_something(search)
    index.check_memory()
    if not set(WHOLE_IMAGES) & set(index.rows["kind"]):
        raise ValueError(f"the index of {index.facts.folder!r} has no images; expected one of images.")
