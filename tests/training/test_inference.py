"""Embeddings, memories and texts of batches: against the model, one at a time, and without what is not needed."""

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from knowing_model import KnowingModel, KnowingProcessor, knowable_rows
from PIL import Image
from tiny_models import build_model
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from mmgem.configuration_mmgem import EMBEDDING_METHODS
from mmgem.training import inference
from mmgem.training.inference import (
    EMBEDDING_MODES,
    answer_from_memory,
    embed_and_remember,
    embed_fused,
    embed_images,
    embed_regions,
    embed_texts,
    generate_answers,
    generate_captions,
    generate_region_captions,
    read_prefix,
    remember,
)
from mmgem.training.search.fingerprint import KINDS as KINDS_OF_PROBES

KINDS = {
    "single": {},
    "mean": {"num_embedding_tokens": 3, "embedding_pooling": "mean"},
    "several": {"num_embedding_tokens": 3, "embedding_pooling": "multi_vector"},
}
SHAPES = {"single": (16,), "mean": (16,), "several": (3, 16)}
TEXTS = ["a red star at the top left", "", "a moon", "what color is it?"]


@pytest.fixture(scope="module")
def rows():
    return knowable_rows(12)


@pytest.fixture
def images(rows):
    return [row["image"] for row in rows[:4]]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    model = build_model(**KINDS[kind])
    with torch.no_grad():
        model.embedding_tokens.normal_(std=0.5)
    return model.train()


def _is_embedding(embeds, shape):
    assert embeds.shape == shape and embeds.dtype == torch.float32 and not embeds.requires_grad
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(shape[:-1]))


def test_embeddings_are_unit_vectors_of_one_or_several_a_piece(model, kind, tiny_processor, images, rows):
    boxes = [row["boxes"] for row in rows[:4]]
    total = sum(map(len, boxes))
    _is_embedding(embed_images(model, tiny_processor, images), (4, *SHAPES[kind]))
    _is_embedding(embed_regions(model, tiny_processor, images, boxes), (total, *SHAPES[kind]))
    _is_embedding(embed_texts(model, tiny_processor, TEXTS, batch_tokens=20), (4, *SHAPES[kind]))
    _is_embedding(embed_fused(model, tiny_processor, images, TEXTS), (4, *SHAPES[kind]))
    _is_embedding(embed_fused(model, tiny_processor, images, TEXTS, boxes), (4, *SHAPES[kind]))
    memory = remember(model, tiny_processor, images)
    assert memory.shape == (4, model.config.num_embedding_tokens, 32) and memory.dtype == torch.float32
    assert model.training


def test_what_comes_in_a_batch_is_what_comes_alone(model, tiny_processor, images, rows):
    boxes = [row["boxes"] for row in rows[:4]]
    one = [slice(row, row + 1) for row in range(4)]
    for together, alone in (
        (embed_texts(model, tiny_processor, TEXTS, 20), [embed_texts(model, tiny_processor, TEXTS[i]) for i in one]),
        (
            embed_fused(model, tiny_processor, images, TEXTS),
            [embed_fused(model, tiny_processor, images[i], TEXTS[i]) for i in one],
        ),
        (
            embed_fused(model, tiny_processor, images, TEXTS, boxes),
            [embed_fused(model, tiny_processor, images[i], TEXTS[i], boxes[i]) for i in one],
        ),
        (
            embed_regions(model, tiny_processor, images, boxes),
            [embed_regions(model, tiny_processor, images[i], boxes[i]) for i in one],
        ),
        (remember(model, tiny_processor, images), [remember(model, tiny_processor, images[i]) for i in one]),
    ):
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_fused_is_the_image_before_the_text(model, tiny_processor, images):
    inputs = tiny_processor(images=images[:2], text=["<image>a moon", "<image>"], return_tensors="pt")
    with torch.no_grad():
        output = model.eval().get_multimodal_features(**inputs)
    embeds = embed_fused(model, tiny_processor, images[:2], ["a moon", ""])
    torch.testing.assert_close(embeds, normalize(output.pooler_output, dim=-1))
    states = embed_and_remember(model, tiny_processor, images[:2])
    torch.testing.assert_close(states.memory[1], output.last_hidden_state[1])
    torch.testing.assert_close(states.fused_embeds[1], embeds[1])
    torch.testing.assert_close(states.image_embeds, embed_images(model, tiny_processor, images[:2]))
    torch.testing.assert_close(remember(model, tiny_processor, images[:2]), states.memory)


def test_visual_tokens_take_the_place_of_pixels(model, tiny_processor, images):
    inputs = tiny_processor(images=images[:2], text=["<image>a moon", "<image>"], padding=True, return_tensors="pt")
    pixel_values = inputs.pop("pixel_values")
    with torch.no_grad():
        visual_tokens = model.eval().get_image_features(pixel_values).last_hidden_state
        expected = model.get_multimodal_features(**inputs, pixel_values=pixel_values)
        output = model.get_multimodal_features(**inputs, visual_tokens=visual_tokens)
        other = model.get_multimodal_features(**inputs, visual_tokens=visual_tokens.flip(0))
    torch.testing.assert_close(output.pooler_output, expected.pooler_output)
    assert not torch.allclose(other.pooler_output, expected.pooler_output, atol=1e-3)
    for extra in ({"pixel_values": pixel_values}, {"boxes": torch.zeros(2, 1, 4)}):
        for method in (model.get_multimodal_features, model.generate):
            with pytest.raises(ValueError, match="`visual_tokens` came with"):
                method(**inputs, visual_tokens=visual_tokens, **extra)
    with pytest.raises(ValueError, match="holds 8 image placeholders.* give 1 images"):
        model.get_multimodal_features(**inputs, visual_tokens=visual_tokens[:1])


def test_images_are_embedded_and_remembered_by_one_pass_of_the_vision_tower(tiny_processor, images):
    model, passes = build_model(num_embedding_tokens=2), []
    model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    embed_and_remember(model, tiny_processor, images)
    assert len(passes) == 1


def test_a_model_that_is_not_calibrated_for_fused_inputs_remembers_as_before(tiny_processor, images):
    model = build_model(num_embedding_tokens=2, calibrated_modalities=["image", "text"])
    model.calibrator.fit({kind: torch.randn(9, 16) + 1 for kind in ("image", "text")})
    states = embed_and_remember(model, tiny_processor, images)
    assert states.fused_embeds is None and model.calibrator is not None
    torch.testing.assert_close(states.memory, remember(model, tiny_processor, images))
    torch.testing.assert_close(states.image_embeds, embed_images(model, tiny_processor, images))


def test_each_kind_of_embedding_has_its_mode_and_its_method(tiny_model, tiny_processor, images):
    assert list(EMBEDDING_MODES) == list(EMBEDDING_METHODS) == tiny_model.config.embedded_kinds
    assert set(EMBEDDING_MODES) < set(KINDS_OF_PROBES)
    inputs = {"images": images, "texts": TEXTS}
    expected = {
        "text": embed_texts(tiny_model, tiny_processor, TEXTS),
        "image": embed_images(tiny_model, tiny_processor, images),
        "fused": embed_fused(tiny_model, tiny_processor, images, TEXTS),
    }
    for kind, mode in EMBEDDING_MODES.items():
        assert hasattr(tiny_model, EMBEDDING_METHODS[kind])
        embeds = mode.embed(tiny_model, tiny_processor, *(inputs[name] for name in mode.takes))
        assert torch.equal(embeds, expected[kind])


def test_several_images_stand_before_one_text(model, tiny_processor, images):
    together = embed_fused(model, tiny_processor, [images[:3], images[3]], ["a moon", "a star"])
    inputs = tiny_processor(images=images[:3], text=["<image><image><image>a moon"], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval().get_multimodal_features(**inputs).pooler_output[0]
    torch.testing.assert_close(together[0], normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    single = embed_fused(model, tiny_processor, images[3:], ["a star"])
    torch.testing.assert_close(together[1:], single, rtol=1e-4, atol=1e-5)


def test_a_box_around_everything_is_the_image(model, tiny_processor, images):
    whole = [[[0, 0, *image.size]] for image in images]
    embeds = embed_fused(model, tiny_processor, images, TEXTS)
    torch.testing.assert_close(embed_fused(model, tiny_processor, images, TEXTS, whole), embeds, rtol=1e-3, atol=1e-4)
    corner = [[[0, 0, 20, 20]], *whole[1:]]
    moved = (embed_fused(model, tiny_processor, images, TEXTS, corner) - embeds).flatten(1).norm(dim=1)
    assert moved[0] > 1e-3 and moved[1:].max() < 1e-3


def test_what_does_not_fit_is_refused(tiny_model, tiny_processor, images):
    with pytest.raises(ValueError, match="`images` holds 3 entries; expected 4, one for each of the texts"):
        embed_fused(tiny_model, tiny_processor, images[:3], TEXTS)
    with pytest.raises(ValueError, match="`boxes` is empty for image 1; expected at least one"):
        embed_fused(tiny_model, tiny_processor, images[:2], TEXTS[:2], [[[0, 0, 9, 9]], []])
    with pytest.raises(ValueError, match="`images` holds 3 entries; expected 4, one for each of the questions"):
        generate_answers(tiny_model, tiny_processor, images[:3], TEXTS)
    memory = remember(tiny_model, tiny_processor, images)
    with pytest.raises(ValueError, match="`memory` holds 4 memories; expected 3"):
        answer_from_memory(tiny_model, tiny_processor, memory, TEXTS[:3])
    with pytest.raises(ValueError, match="embedding_tokens"):
        answer_from_memory(tiny_model, tiny_processor, memory[..., :16])


def test_answers_in_a_batch_are_those_one_at_a_time(model, tiny_processor, images):
    answers = generate_answers(model, tiny_processor, images, TEXTS, 6)
    assert answers == [
        generate_answers(model, tiny_processor, [image], [text], 6)[0]
        for image, text in zip(images, TEXTS, strict=True)
    ]
    assert answers[1] == generate_captions(model, tiny_processor, images, 6)[1]
    assert len(set(answers)) > 1


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_answers_to_visual_tokens_are_those_to_pixels(tiny_model, tiny_processor, images, options):
    inputs = tiny_processor(images=images[:2], text=["<image>a moon", "<image>"], return_tensors="pt")
    pixel_values = inputs.pop("pixel_values")
    options |= {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    expected = tiny_model.eval().generate(**inputs, pixel_values=pixel_values, **options)
    visual_tokens = tiny_model.get_image_features(pixel_values).last_hidden_state
    assert torch.equal(tiny_model.generate(**inputs, visual_tokens=visual_tokens, **options), expected)
    rationale = {"max_rationale_tokens": 3}
    torch.testing.assert_close(
        tiny_model.get_multimodal_features(**inputs, visual_tokens=visual_tokens, **rationale).pooler_output,
        tiny_model.get_multimodal_features(**inputs, pixel_values=pixel_values, **rationale).pooler_output,
    )


def test_several_questions_about_an_image_share_its_vision_pass(model, tiny_processor, images, monkeypatch):
    asked = [images[0], images[1], images[0], images[0]]
    expected = [
        generate_answers(model, tiny_processor, [image], [text], 6)[0]
        for image, text in zip(asked, TEXTS, strict=True)
    ]
    seen, run = [], model._patch_grid
    monkeypatch.setattr(model, "_patch_grid", lambda pixels, *others: seen.append(len(pixels)) or run(pixels, *others))
    assert generate_answers(model, tiny_processor, asked, TEXTS, 6) == expected
    assert seen == [2]


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("text", ["llama", "gpt2", "cohere"])
def test_the_beginning_of_prompts_is_read_once_for_an_image(text, num_beams):
    model = build_model(text=text)
    model.generation_config.update(num_beams=num_beams, eos_token_id=None, pad_token_id=0)
    n, image = model.config.num_visual_tokens, model.config.image_token_id
    numbers, questions = [1, 0, 1, 1], [[5, 6], [5, 7, 8, 9, 10, 11, 12], [5, 9], [5, 20, 21, 22]]
    rows = [torch.tensor([17, *[image] * n, 18, *question]) for question in questions]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    tokens = torch.randn(2, n, model.config.grid.hidden_size)
    lengths, decoder = [], model.get_decoder()
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(**inputs, visual_tokens=tokens[numbers], **options)
    hook = decoder.register_forward_hook(lambda decoder, args, output: lengths.append(output[0].shape[:2]))
    found = model.generate(**inputs, **read_prefix(model, inputs, tokens, numbers), **options)
    hook.remove()
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    beginning = n + 3  # all begin with 17, the image, 18 and 5
    assert lengths[:2] == [(2, beginning), (4 * num_beams, ids.shape[1] - beginning)]


def test_what_cannot_be_shared_is_read_for_each_prompt(tiny_model, tiny_processor, images):
    inputs = tiny_processor(images=images[:2], text=["<image>a moon", "a <image>"], return_tensors="pt", padding=True)
    tokens = torch.randn(1, 4, 32)
    assert read_prefix(tiny_model, inputs, tokens, [0, 0]) == {}  # prompts begin differently
    windows = build_model(text="gemma3")
    inputs = tiny_processor(images=images[:2], text=["<image>a moon", "<image>a star"], return_tensors="pt")
    assert read_prefix(windows, inputs, tokens, [0, 0]) == {}
    assert read_prefix(tiny_model.eval(), inputs, tokens, [0, 0]).keys() == {"past_key_values", "inputs_embeds"}


def test_answers_from_memory_need_no_vision_tower(model, tiny_processor, images, monkeypatch):
    memory = remember(model, tiny_processor, images)
    monkeypatch.setattr(model.vision_tower, "forward", None)
    answers = answer_from_memory(model, tiny_processor, memory, TEXTS, 6)
    assert answers == [
        answer_from_memory(model, tiny_processor, memory[row : row + 1], [text], 6)[0]
        for row, text in enumerate(TEXTS)
    ]
    inputs = tiny_processor(text=TEXTS[3:], return_tensors="pt")
    ids = model.eval().generate(**inputs, embedding_tokens=memory[3:], max_new_tokens=6, do_sample=False)
    assert answers[3] == tiny_processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    captions = answer_from_memory(model, tiny_processor, memory, max_new_tokens=6)
    assert captions[1] == answers[1] and len(captions) == 4


def test_the_whole_memory_is_given_to_the_model(tiny_processor, images, monkeypatch):
    model = build_model(num_embedding_tokens=3).half()
    memory = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    given = {}

    def generate(**inputs):
        given.update(inputs)
        return inputs["input_ids"]

    monkeypatch.setattr(model, "generate", generate)
    assert answer_from_memory(model, tiny_processor, memory, TEXTS[2:], 5) == TEXTS[2:]
    assert torch.equal(given.pop("embedding_tokens"), memory.half())
    assert (
        set(given) == {"input_ids", "attention_mask", "max_new_tokens", "do_sample"} and given["max_new_tokens"] == 5
    )


def test_answers_move_with_the_memory(tiny_processor, images):
    model = build_model(num_embedding_tokens=3)
    memory = remember(model, tiny_processor, images)
    noise = torch.randn(memory.shape, generator=torch.Generator().manual_seed(0))
    texts = [answer_from_memory(model, tiny_processor, one, max_new_tokens=8) for one in (memory, 5 * noise)]
    assert texts[0] != texts[1]
    half = answer_from_memory(model, tiny_processor, memory.half(), max_new_tokens=8)  # as an index stores it
    first = answer_from_memory(model, tiny_processor, memory[:, :1], max_new_tokens=8)  # fewer than k will do
    assert len(half) == len(first) == 4


def test_texts_are_batched_by_length_and_returned_in_order(rows):
    model, processor = KnowingModel(rows), KnowingProcessor()
    texts = [text for row in rows for text in (*row["captions"], row["long_caption"], "")]
    embeddings = embed_texts(model, processor, texts, batch_tokens=200)
    expected = torch.stack([torch.nn.functional.normalize(model._embed(text), dim=0) for text in texts])
    assert torch.equal(embeddings, expected)
    padding = sum((mask == 0).sum().item() for mask in model.text_batches)
    assert padding < 0.1 * sum(mask.numel() for mask in model.text_batches)
    with pytest.raises(ValueError, match="`texts` is empty; expected at least one"):
        embed_texts(model, processor, [])


def test_many_boxes_go_through_the_model_some_at_a_time(tiny_model, tiny_processor, images, monkeypatch):
    boxes = [[[0, 0, 9 + number, 20] for number in range(count)] for count in (1, 7, 2, 3)]
    embeds = embed_regions(tiny_model, tiny_processor, images, boxes)
    captions = generate_region_captions(tiny_model, tiny_processor, images, boxes, max_new_tokens=4)
    monkeypatch.setattr(inference, "BOXES_AT_A_TIME", 3)
    batches = list(inference._in_batches(boxes))
    assert [[len(part.boxes) for part in batch] for batch in batches] == [[1, 1], [2], [3], [3], [3]]
    parts = sorted(part for batch in batches for part in batch)
    assert [box for part in parts for box in part.boxes] == sum(boxes, [])
    torch.testing.assert_close(embed_regions(tiny_model, tiny_processor, images, boxes), embeds, atol=1e-5, rtol=0)
    assert generate_region_captions(tiny_model, tiny_processor, images, boxes, max_new_tokens=4) == captions


def test_captions_of_boxes_are_asked_for_by_their_prompt(tiny_model, tiny_processor, images, monkeypatch):
    box, asked = [4, 4, 20, 20], "What is here?"
    plain = generate_region_captions(tiny_model, tiny_processor, images[:1], [[box]], max_new_tokens=4)
    monkeypatch.setattr(tiny_model.config, "prompts", {"region_caption": asked})
    assert generate_region_captions(tiny_model, tiny_processor, images[:1], [[box]], max_new_tokens=4) != plain
    inputs = tiny_processor(images=images[:1], boxes=[[box]], text=[tiny_processor.prompt(asked)], return_tensors="pt")
    ids = tiny_model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = [tiny_processor.tokenizer.decode(ids[0], skip_special_tokens=True).strip()]
    assert generate_region_captions(tiny_model, tiny_processor, images[:1], [[box]], max_new_tokens=4) == expected


def test_images_without_boxes_are_passed_over_and_of_no_boxes_nothing_is_embedded(tiny_model, tiny_processor, images):
    boxes = [[], [[0, 0, 9, 20], [5, 5, 30, 30]], [], [[0, 0, 20, 9]]]
    expected = embed_regions(tiny_model, tiny_processor, images[1::2], boxes[1::2])
    torch.testing.assert_close(embed_regions(tiny_model, tiny_processor, images, boxes), expected)
    with pytest.raises(ValueError, match="without any box"):
        embed_regions(tiny_model, tiny_processor, images, [[]] * 4)


def test_a_model_in_evaluation_mode_is_not_told_so_again(tiny_model, monkeypatch):
    def train(mode=True):
        raise AssertionError

    monkeypatch.setattr(tiny_model, "train", train)
    with inference.inference(tiny_model):
        assert torch.is_inference_mode_enabled()
    monkeypatch.undo()
    part = tiny_model.language_model
    part.train()
    with inference.inference(tiny_model):
        assert not part.training
    part.eval()


def test_regions_come_without_padding(rows):
    boxes = [row["boxes"] for row in rows]
    embeddings = embed_regions(KnowingModel(rows), KnowingProcessor(), [row["image"] for row in rows], boxes)
    assert len(embeddings) == sum(map(len, boxes)) and torch.allclose(embeddings.norm(dim=-1), torch.tensor(1.0))


def test_the_tower_runs_once_for_threads_that_end_at_any_time(tiny_model, tiny_processor):
    pictures = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    expected = embed_images(tiny_model, tiny_processor, pictures)
    first, second = inference.tower_runs_once(tiny_model), inference.tower_runs_once(tiny_model)
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        assert torch.equal(embed_images(tiny_model, tiny_processor, pictures), expected)
    second.__exit__(None, None, None)
    assert "_patch_grid" not in vars(tiny_model)


def test_threads_do_not_get_the_padding_of_each_other(tiny_model, tiny_processor, monkeypatch):
    """A fast tokenizer is told how to pad, and then encodes: between the two another thread may tell it otherwise."""
    kind = type(tiny_processor.tokenizer)
    tell = kind.set_truncation_and_padding

    def tell_and_wait(self, *args, **kwargs):
        tell(self, *args, **kwargs)
        time.sleep(0.005)

    monkeypatch.setattr(kind, "set_truncation_and_padding", tell_and_wait)
    monkeypatch.setattr(tiny_processor, "cut_texts", tiny_processor.cut_texts)
    texts = [text * 3 for text in TEXTS]
    alone = embed_texts(tiny_model, tiny_processor, texts)
    calls = [lambda: tiny_processor(text=texts, padding=True), lambda: tiny_processor(text=texts, max_length=2)]
    with ThreadPoolExecutor() as threads:
        others = [threads.submit(call) for call in calls * 10]
        for embeds in [threads.submit(embed_texts, tiny_model, tiny_processor, texts) for _ in range(10)]:
            torch.testing.assert_close(embeds.result(), alone, rtol=0, atol=1e-5)
    assert {len(other.result()["input_ids"][0]) for other in others[1::2]} == {2}


def test_a_model_trains_again_after_the_last_thread_that_runs_it():
    model, is_first_done, is_second_there = torch.nn.Dropout(), Event(), Event()

    def second() -> bool:
        with inference.inference(model):
            is_second_there.set()
            is_first_done.wait(9)
            return model.training

    with ThreadPoolExecutor() as threads:
        with inference.inference(model):
            other = threads.submit(second)
            assert is_second_there.wait(9)
            with inference.inference(model):
                assert not model.training
            assert not model.training
        is_first_done.set()
        assert not other.result() and model.training
    model.eval()
    with inference.inference(model):
        pass
    assert not model.training and not inference._modes


@pytest.mark.parametrize("after", [(), ("another",)], ids=["seen at its end", "seen by another thread"])
def test_a_model_that_is_set_to_training_while_it_embeds_gives_an_error(after):
    model = torch.nn.Dropout().eval()
    with pytest.raises(RuntimeError, match="`model` was set to training mode by another thread"):
        with inference.inference(model):
            model.train()
            for _ in after:
                with inference.inference(model):
                    assert not model.training
    assert model.training
    with inference.inference(model):
        pass
