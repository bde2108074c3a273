import shutil

import pytest
import torch
from image_folders import NAMES
from tiny_models import build_model

from mmgem.training.inference import answer_from_memory, remember
from mmgem.training.search.asking import ask
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex

pytestmark = pytest.mark.usefixtures("short_answers")

K = 3


@pytest.fixture
def model():
    """A model that writes something else about each image, since its weights are large."""
    model = build_model(text="qwen3", num_embedding_tokens=K, embedding_pooling="mean", prompts={"query": "Find: "})
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data *= 15
    return model


@pytest.fixture
def texts_of(folder, model, tiny_processor):
    """What the model writes from the memory of an image, as float16 has it."""

    def texts_of(names, question=None, count=K):
        memory = remember(model, tiny_processor, [folder / name for name in names])[:, :count].half()
        return answer_from_memory(model, tiny_processor, memory, question and [question] * len(names))

    return texts_of


@pytest.fixture
def index(folder, out, model, tiny_processor, texts_of):
    build_index(folder, model, tiny_processor, out, memory=True)
    return SearchIndex.load(out, model, tiny_processor)


def test_answers_come_from_the_memory_alone(index, folder, model, tiny_processor, texts_of, out, monkeypatch):
    names = [NAMES[5], NAMES[2], NAMES[2]]
    expected = texts_of(names, "what color?")
    assert len(set(expected)) == 2, "the memories of two images must be told apart"
    captions = texts_of(names)
    shutil.rmtree(folder)
    monkeypatch.setattr(model.vision_tower, "forward", None)
    monkeypatch.setattr(tiny_processor.image_processor, "preprocess", None)
    index = SearchIndex.load(out, model, tiny_processor)
    answers = ask(index, "what color?", images=names)
    assert [answer.text for answer in answers] == expected
    assert [(answer.path, answer.score) for answer in answers] == [(folder / name, None) for name in names]
    assert [answer.text for answer in ask(index, images=names)] == captions != expected

    hits = index.search("Find: a star", top=3)
    found = ask(index, "what color?", search="a star", top=3, prompt="query")
    assert [(answer.path, answer.score) for answer in found] == [(hit.path, hit.score) for hit in hits]


def test_answers_do_not_depend_on_the_batch(index, texts_of, monkeypatch):
    monkeypatch.setattr("mmgem.training.search.asking.BATCH_SIZE", 2)
    assert [answer.text for answer in ask(index, "what?", images=NAMES)] == texts_of(NAMES, "what?")


def test_the_first_states_of_a_memory_are_a_memory(folder, out, model, tiny_processor, texts_of):
    build_index(folder, model, tiny_processor, out, memory=1)
    index = SearchIndex.load(out, model, tiny_processor)
    assert index.memory([0, 3]).shape == (2, 1, 32)
    answers = ask(index, "what?", images=NAMES[:2])
    assert [answer.text for answer in answers] == texts_of(NAMES[:2], "what?", count=1)


def test_images_are_known_by_name_and_by_path(index, folder, monkeypatch):
    monkeypatch.chdir(folder / "deep")
    link = folder.with_name("link")
    link.symlink_to(folder)
    paths = ["deep/er/1.png", "er/1.png", folder / "deep" / "er" / "1.png", link / "deep/er/1.png", "../deep/er/1.png"]
    for path in paths:
        [answer] = ask(index, images=[path])
        assert answer.path == folder / "deep/er/1.png"
    for path in ["1.png", "deep/er/9.png", "/elsewhere/deep/er/1.png", ""]:
        with pytest.raises(ValueError, match="is not in the index; expected names such as '0.png'"):
            ask(index, images=[path])


def test_what_cannot_be_asked_is_refused(index, folder, out, model, tiny_processor):
    for arguments, message in [
        ({}, "`images` and `search` are both None; expected one"),
        ({"images": NAMES, "search": "a star"}, "`images` and `search` are both given; expected one"),
        ({"images": []}, "`images` is empty"),
        ({"images": NAMES, "question": " "}, "`question` is ' '"),
        ({"images": NAMES, "prompt": "query"}, "`prompt` is 'query', but there is no `search`"),
        ({"search": "a star", "prompt": "edit"}, "`prompt` is 'edit'; expected one of 'query'"),
        ({"search": "a star", "top": 0}, "`top` is 0; expected 1 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            ask(index, **arguments)
    build_index(folder, model, tiny_processor, out.with_name("without"))
    with pytest.raises(ValueError, match="has no memory; expected one that was made `--with-memory`"):
        ask(SearchIndex.load(out.with_name("without"), model, tiny_processor), images=NAMES)


@pytest.mark.parametrize("part", ["vision_tower", "token_projection", "language_model", "embedding_tokens"])
def test_the_memory_of_another_checkpoint_is_refused(index, out, model, tiny_processor, part):
    for name, weight in model.named_parameters():
        if name.startswith(part) and weight.ndim > 1:
            torch.nn.init.normal_(weight)
    with pytest.raises(ValueError, match="which (embeds texts otherwise|has other weights)"):
        SearchIndex.load(out, model, tiny_processor)
