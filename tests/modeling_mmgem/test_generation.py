"""What `generate` of transformers offers beyond a plain call, on prompts with images."""

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

PLAIN = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture
def inputs(tiny_model, pixel_values):
    """`<image>` and two words."""
    n, image = tiny_model.config.num_visual_tokens, tiny_model.config.image_token_id
    input_ids = torch.tensor([[*[image] * n, 10, 11]])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixel_values[:1]}


def test_what_is_drafted_from_the_prompt_asks_for_no_images(tiny_model, inputs):
    """A draft continues the last words as the prompt did, whose words stand before an image here."""
    expected = tiny_model.generate(**inputs, **PLAIN)
    n = tiny_model.config.num_visual_tokens
    inputs["input_ids"] = torch.cat([inputs["input_ids"][:, n:], inputs["input_ids"]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = tiny_model.generate(**inputs, **PLAIN)
    assert torch.equal(tiny_model.generate(**inputs, **PLAIN, prompt_lookup_num_tokens=3), expected)
    settings = GenerationConfig(**PLAIN, prompt_lookup_num_tokens=3, suppress_tokens=[int(expected[0, -6])])
    assert not torch.isin(tiny_model.generate(**inputs, generation_config=settings)[0, -6:], expected[0, -6]).any()


def test_a_model_that_drafts_sees_the_images(tiny_model, inputs):
    expected = tiny_model.generate(**inputs, **PLAIN)
    seen = []
    assistant = copy.deepcopy(tiny_model)
    assistant.vision_tower.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(tiny_model.generate(**inputs, **PLAIN, assistant_model=assistant), expected)
    assert seen == [1]  # and once, as there is a cache from then on


@pytest.mark.parametrize("further", [False, True], ids=["the same images", "one more image"])
def test_a_conversation_goes_on_with_its_cache(tiny_model, inputs, pixel_values, further):
    begun = tiny_model.generate(**inputs, **PLAIN, return_dict_in_generate=True)
    question = inputs["input_ids"] if further else torch.tensor([[12, 13]])
    input_ids = torch.cat([begun.sequences, question], dim=1)
    images = torch.cat([inputs["pixel_values"], pixel_values[1:2]]) if further else inputs["pixel_values"]
    longer = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    expected = tiny_model.generate(**longer, pixel_values=images, **PLAIN)
    new = {"pixel_values": pixel_values[1:2]} if further else {"pixel_values": images}
    assert torch.equal(tiny_model.generate(**longer, **new, **PLAIN, past_key_values=begun.past_key_values), expected)


def test_the_length_of_the_caller_goes_before_that_of_the_model(tiny_model, inputs):
    assert tiny_model.generation_config.max_new_tokens > 6
    length = inputs["input_ids"].shape[1] + 3
    assert tiny_model.generate(**inputs, max_length=length, min_new_tokens=3).shape == (1, length)
    settings = GenerationConfig(max_length=length, min_new_tokens=3)
    assert tiny_model.generate(**inputs, generation_config=settings).shape == (1, length)
    with pytest.raises(ValueError, match="`max_length` is set to 4"):
        tiny_model.generate(**inputs, max_length=4)


@pytest.mark.slow
def test_continuous_batching_writes_the_same(tiny_model):
    prompts = [[10, 11, 12], [13, 14]]
    expected = [tiny_model.generate(torch.tensor([ids]), **PLAIN)[0, len(ids) :].tolist() for ids in prompts]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)
    model = copy.deepcopy(tiny_model)  # whose attention is changed by it
    found = model.generate_batch(prompts, settings, small)
    assert [answer.generated_tokens for answer in found.values()] == expected


def test_continuous_batching_takes_no_images(tiny_model, inputs):
    with pytest.raises(ValueError, match=r"`inputs\[1\]` holds image placeholders; expected texts alone"):
        tiny_model.generate_batch([[10, 11], inputs["input_ids"][0].tolist()])
