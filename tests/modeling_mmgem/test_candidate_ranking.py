"""Of the captions of all beams, the one that the model finds closest to the image."""

import copy

import pytest
import torch
from PIL import Image
from tiny_models import build_model
from torch.nn.functional import normalize
from transformers import GenerationConfig

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.inference import generate_answers, generate_captions

BEAMS = {"num_beams": 4, "max_new_tokens": 6, "do_sample": False}


def prompts_of(model, pixel_values, words=((), ())):
    """`<image>` and words, padded on the left."""
    rows = [[model.config.image_token_id] * model.config.num_visual_tokens + list(own) for own in words]
    length = max(map(len, rows))
    input_ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": mask, "pixel_values": pixel_values[: len(rows)]}


def texts_of(model, sequences, prompt_length):
    """The tokens before the end, or before padding."""
    ends = torch.as_tensor(model.generation_config.eos_token_id).reshape(-1).tolist()
    rows = sequences[:, prompt_length:].tolist()
    return [row[: min([row.index(end) for end in ends if end in row], default=len(row))] for row in rows]


def ranked_by_hand(model, inputs, weight, returned=1):
    """Text by text, and image by image."""
    count, length = BEAMS["num_beams"], inputs["input_ids"].shape[1]
    beams = model.generate(
        **inputs, **BEAMS, num_return_sequences=count, return_dict_in_generate=True, output_scores=True
    )
    texts = texts_of(model, beams.sequences, length)
    images = model.get_image_features(inputs["pixel_values"]).pooler_output
    best = []
    for row, image in enumerate(images):
        scores = []
        for number in range(count * row, count * (row + 1)):
            embeds = model.get_text_features(torch.tensor([texts[number]], dtype=torch.long)).pooler_output[0]
            texts_and_image = normalize(torch.atleast_2d(embeds), dim=-1), normalize(torch.atleast_2d(image), dim=-1)
            cosines = texts_and_image[0] @ texts_and_image[1].T  # (k, k): MaxSim, or the one cosine
            scores.append(float(beams.sequences_scores[number] + weight * cosines.amax(-1).mean()))
        order = sorted(range(count), key=lambda number: -scores[number])  # noqa: B023
        best += [texts[count * row + number] for number in order[:returned]]
    return best


@pytest.mark.parametrize("weight", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("pooling", [{}, {"embedding_pooling": "multi_vector", "num_embedding_tokens": 3}], ids=str)
@torch.no_grad()
def test_captions_are_those_ranked_by_hand(pixel_values, weight, pooling):
    tiny_model = build_model(**pooling)
    inputs = prompts_of(tiny_model, pixel_values)
    for returned in (1, 3):
        ids = tiny_model.generate(**inputs, **BEAMS, image_similarity_weight=weight, num_return_sequences=returned)
        assert texts_of(tiny_model, ids, inputs["input_ids"].shape[1]) == ranked_by_hand(
            tiny_model, inputs, weight, returned
        )


@torch.no_grad()
def test_a_heavy_weight_changes_what_is_written_and_none_does_not(tiny_model, pixel_values):
    inputs = prompts_of(tiny_model, pixel_values)
    plain = tiny_model.generate(**inputs, **BEAMS)
    assert not torch.equal(tiny_model.generate(**inputs, **BEAMS, image_similarity_weight=100.0), plain)
    for nothing in (0, 1e-9):
        assert torch.equal(tiny_model.generate(**inputs, **BEAMS, image_similarity_weight=nothing), plain)


@torch.no_grad()
def test_an_image_alone_and_among_others_gets_the_same_caption(tiny_model, pixel_values):
    both = prompts_of(tiny_model, pixel_values)
    length = both["input_ids"].shape[1]
    written = tiny_model.generate(**both, **BEAMS, image_similarity_weight=3.0)
    for row in range(2):
        one = {name: tensor[row : row + 1] for name, tensor in both.items()}
        alone = tiny_model.generate(**one, **BEAMS, image_similarity_weight=3.0)
        assert texts_of(tiny_model, alone, length)[0] == texts_of(tiny_model, written, length)[row]


@torch.no_grad()
def test_boxes_are_compared_with_their_own_embeddings(tiny_model, pixel_values):
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.4, 0.1, 1.0, 0.9]]])
    inputs = prompts_of(tiny_model, pixel_values) | {"pixel_values": pixel_values[:1], "boxes": boxes}
    written = tiny_model.generate(**inputs, **BEAMS, image_similarity_weight=100.0)
    tokens = tiny_model.get_image_features(pixel_values[:1], boxes).last_hidden_state[0]
    del inputs["pixel_values"], inputs["boxes"]
    again = tiny_model.generate(**inputs, **BEAMS, visual_tokens=tokens, image_similarity_weight=100.0)
    assert torch.equal(written, again)
    other = tiny_model.generate(**inputs, **BEAMS, visual_tokens=tokens.flip(0), image_similarity_weight=100.0)
    assert torch.equal(other.flip(0), written)


@torch.no_grad()
def test_answers_are_left_as_they_are_beside_captions(tiny_model, pixel_values):
    words = prompts_of(tiny_model, pixel_values, [(), (10, 11)])
    plain = tiny_model.generate(**words, **BEAMS)
    ranked = tiny_model.generate(**words, **BEAMS, image_similarity_weight=100.0)
    length = words["input_ids"].shape[1]
    (caption, answer), (ranked_caption, same_answer) = (texts_of(tiny_model, ids, length) for ids in (plain, ranked))
    assert answer == same_answer and caption != ranked_caption


@torch.no_grad()
def test_answers_alone_are_not_embedded(tiny_model, pixel_values, monkeypatch):
    words = prompts_of(tiny_model, pixel_values, [(10,), (10, 11)])
    expected = tiny_model.generate(**words, **BEAMS)
    monkeypatch.setattr(tiny_model, "get_text_features", None)
    assert torch.equal(tiny_model.generate(**words, **BEAMS, image_similarity_weight=100.0), expected)


@torch.no_grad()
def test_the_weight_of_the_folder_counts_for_captions_by_beam_search(tiny_model, pixel_values, tmp_path):
    model = copy.deepcopy(tiny_model)
    model.generation_config.update(image_similarity_weight=100.0, num_beams=4, allow_custom_entries=True)
    model.save_pretrained(tmp_path)
    model = MMGEMModel.from_pretrained(tmp_path).eval()
    inputs = prompts_of(tiny_model, pixel_values)
    expected = tiny_model.generate(**inputs, **BEAMS, image_similarity_weight=100.0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), expected)
    assert torch.equal(model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=6)), expected)
    for without in ({"image_similarity_weight": 0}, {"return_dict_in_generate": True}):
        written = model.generate(**inputs, max_new_tokens=6, **without)
        assert torch.equal(getattr(written, "sequences", written), tiny_model.generate(**inputs, **BEAMS))
    one_beam = model.generate(**inputs, max_new_tokens=6, num_beams=1)
    assert torch.equal(one_beam, tiny_model.generate(**inputs, max_new_tokens=6))
    memory = tiny_model.get_multimodal_features(**inputs).last_hidden_state
    assert len(model.generate(embedding_tokens=memory, max_new_tokens=6)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 1}, "but `num_beams` is 1"),
        ({"return_dict_in_generate": True}, "but `return_dict_in_generate` is True"),
        ({"pixel_values": None, "input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": None}, "with images"),
        ({"image_similarity_weight": -1.0}, "`image_similarity_weight` is -1.0; expected a number of at least 0"),
        ({"image_similarity_weight": float("nan")}, "`image_similarity_weight` is nan"),
        ({"image_similarity_weight": "much"}, "`image_similarity_weight` is 'much'"),
    ],
    ids=["one beam", "details", "no image", "negative", "no number", "a word"],
)
def test_what_cannot_be_ranked_is_refused(tiny_model, pixel_values, arguments, message):
    inputs = prompts_of(tiny_model, pixel_values) | BEAMS | {"image_similarity_weight": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(**inputs)


def test_an_image_that_comes_twice_gets_the_same_caption(tiny_processor):
    model = build_model()
    model.generation_config.update(image_similarity_weight=100.0, num_beams=4, allow_custom_entries=True)
    red, blue = (Image.new("RGB", (40, 30), color) for color in ("red", "blue"))
    captions = generate_captions(model, tiny_processor, [red, blue], 6)
    answers = generate_answers(model, tiny_processor, [red, blue, red], [""] * 3, 6)
    assert answers == [*captions, captions[0]]
    model.generation_config.image_similarity_weight = None
    assert generate_captions(model, tiny_processor, [red, blue], 6) != captions
