"""Every family of language models: a text is the same alone, padded on either side, and in a joint step."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import every
from language_models import LLAMA, MECHANISMS, PACKING, REFUSED, build_language_model
from tiny_models import IMAGE_SIZE, build_towers
from transformers import AutoModelForCausalLM, Gemma4TextConfig, T5Config, T5ForConditionalGeneration

from mmgem.language_model_probe import _narrow_windows, _Probe, probe_language_model
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.text_rows import IGNORED_LABEL

TEXTS = [list(range(10, 23)), [31, 32, 33, 34, 35, 36, 37], [41, 42, 43, 44, 45], [51]]
PADDING = 12  # longer than any window of `language_models`

every_family = pytest.mark.parametrize("name", every(PACKING, MECHANISMS))


@cache
def compose(name, text_attention="causal"):
    vision, _ = build_towers()
    sizes = {"projection_dim": 16, "num_visual_tokens": 4, "num_embedding_tokens": 2}
    model = MMGEMModel.from_towers(vision, build_language_model(name), text_attention=text_attention, **sizes)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.embedding_tokens)
    return model


def padded(texts, side, padding=0):
    length = max(map(len, texts)) + padding
    ids, mask = torch.full((len(texts), length), 7), torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(length - len(text), length)
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


def pixel_values():
    return torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def joint_embeds(model, texts=TEXTS, images=None, side="right"):
    """(T, D) of a joint step in which every text is written from its image as well."""
    images = pixel_values() if images is None else images
    return model(**padded(texts, side), pixel_values=images, return_loss=True).text_embeds


def close(found, expected):
    return torch.allclose(found, expected, atol=1e-5, rtol=1e-5)


@every_family
@torch.no_grad()
def test_a_text_is_the_same_in_every_company(name):
    model = compose(name)
    if transformers.__version__.startswith("5.23."):  # versions differ in what they honour, and the probe follows them
        assert model.config.sequence_packing == PACKING[name]
    alone = torch.cat([model.get_text_features(torch.tensor([text])).pooler_output for text in TEXTS])  # (T, D)
    for side in ("left", "right"):
        assert close(model.get_text_features(**padded(TEXTS, side, PADDING)).pooler_output, alone)
        assert close(joint_embeds(model, side=side), F.normalize(alone, dim=-1))
    # Others may change, and so may its image, which stands before it where it is written.
    changed = joint_embeds(model, [[88] * len(TEXTS[0]), TEXTS[1], [99] * len(TEXTS[2]), TEXTS[3]])
    assert close(changed[1::2], F.normalize(alone, dim=-1)[1::2])
    assert not torch.allclose(changed[0::2], F.normalize(alone, dim=-1)[0::2], atol=1e-3)
    assert close(joint_embeds(model, images=pixel_values() + 1), F.normalize(alone, dim=-1))


@every_family
def test_a_text_has_no_gradient_by_the_words_of_another(name):
    model = compose(name)
    words = model.get_input_embeddings().weight
    # The shortest but one stands behind another in its row, if rows are packed.
    (gradient,) = torch.autograd.grad(joint_embeds(model)[2, 0], words)  # (V, H)
    others = [token for text in TEXTS if text is not TEXTS[2] for token in text]
    assert not gradient[others].any() and gradient[TEXTS[2][-1]].any()


@every_family
@torch.no_grad()
def test_captions_cost_and_read_what_they_do_alone(name):
    model = compose(name)
    labels = torch.full((4, 13), IGNORED_LABEL)
    labels[1, :7] = torch.tensor(TEXTS[1])
    batch = padded(TEXTS, "right")
    found = model(**batch, labels=labels, pixel_values=pixel_values(), return_loss=True).caption_loss
    prompt = torch.tensor([[model.config.image_token_id] * 4 + TEXTS[1] + [model.config.text_config.eos_token_id]])
    alone = prompt.masked_fill(prompt == model.config.image_token_id, IGNORED_LABEL)
    expected = model(input_ids=prompt, pixel_values=pixel_values()[1:2], labels=alone).loss
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    texts = [TEXTS[1], TEXTS[2]]
    batch = padded(texts, "left")
    together = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, -3:]
    for text, written in zip(texts, together.tolist(), strict=True):
        for token in written:
            logits = model(input_ids=torch.tensor([text])).logits[0, -1]
            assert token == logits.argmax() or token == logits.topk(2).indices[1] and token != 0
            text = [*text, token]


@pytest.mark.parametrize("name", every(REFUSED, MECHANISMS))
def test_what_cannot_be_part_of_a_model_is_refused(name):
    with pytest.raises(ValueError, match=f"`text` is a `{name}` model.*expected a language model that .*") as error:
        compose(name)
    assert REFUSED[name][1] in str(error.value)


def test_an_encoder_decoder_is_refused():
    vision, _ = build_towers()
    text = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match="`text` is a `t5` model, an encoder-decoder; expected a decoder alone"):
        MMGEMModel.from_towers(vision, text)


@pytest.mark.parametrize(
    "name", every(["llama", "mistral", "gemma3_text", "gpt2", "gpt_oss", "opt", "xglm", "jamba"], MECHANISMS)
)
@torch.no_grad()
def test_read_both_ways_a_text_is_the_same_in_every_company(name):
    model = compose(name, "bidirectional")
    assert model.config.sequence_packing == PACKING[name]
    alone = torch.cat([model.get_text_features(torch.tensor([text])).pooler_output for text in TEXTS])  # (T, D)
    for side in ("left", "right"):
        assert close(model.get_text_features(**padded(TEXTS, side, PADDING)).pooler_output, alone)
        assert close(joint_embeds(model, side=side), F.normalize(alone, dim=-1))


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_what_looks_back_alone_is_not_read_both_ways(name):
    with pytest.raises(ValueError, match="`text_attention` 'bidirectional'"):
        compose(name, "bidirectional")
    model = copy.deepcopy(compose(name))
    model.config.text_attention = "bidirectional"
    with pytest.raises(ValueError, match="`text_attention` 'bidirectional', which do not hold for this"):
        model.get_text_features(torch.tensor([TEXTS[0]]))


@pytest.mark.parametrize(
    ("name", "packing"), [("lfm2", "position_ids"), ("opt", "position_ids"), ("bloom", "block_mask")]
)
def test_an_answer_that_does_not_hold_is_refused_by_the_first_step(name, packing, tmp_path):
    model = compose(name)
    model.save_pretrained(tmp_path)
    loaded = MMGEMModel.from_pretrained(tmp_path).train()
    assert loaded.config.sequence_packing == PACKING[name]
    joint_embeds(loaded)
    loaded.config.sequence_packing = packing
    for _ in range(2):
        with pytest.raises(ValueError, match=f"`sequence_packing` is '{packing}' .* this `{name}` model"):
            joint_embeds(loaded)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_answer_does_not_depend_on_the_dtype(name, dtype):
    vision = build_towers()[0].to(dtype)
    model = MMGEMModel.from_towers(vision, build_language_model(name).to(dtype), num_visual_tokens=4)
    assert model.config.sequence_packing == PACKING[name]


ROPE = {"rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}


@pytest.mark.parametrize(
    ("name", "fields", "limit"),
    [
        ("phi3", {"rope_parameters": ROPE | {"rope_type": "longrope"}, "original_max_position_embeddings": 40}, 40),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}}, 255),
    ],
)
@torch.no_grad()
def test_positions_that_follow_the_longest_text_end_where_they_begin_to(name, fields, limit, monkeypatch):
    text = build_language_model(name, **fields)
    model = MMGEMModel.from_towers(build_towers()[0], text, projection_dim=16, num_visual_tokens=4)
    alone = model.get_text_features(torch.tensor([TEXTS[0]])).pooler_output
    longest = [list(range(2, 2 + limit - 1)), TEXTS[0]]  # and [EMB]
    assert close(model.get_text_features(**padded(longest, "right")).pooler_output[1:], alone)
    model.language_model(inputs_embeds=torch.zeros(1, 256, 32))  # what is written may be longer
    assert close(model.get_text_features(**padded(longest, "left")).pooler_output[1:], alone)
    with pytest.raises(ValueError, match=f"takes at most {limit}"):
        model.get_text_features(torch.zeros(1, limit, dtype=torch.long))
    if name == "phi3":
        monkeypatch.setattr(type(model.config), "max_sequence_length", 256)
        with pytest.raises(ValueError, match="expected a language model that reads a text in the same way beside"):
            MMGEMModel.from_towers(build_towers()[0], text, num_visual_tokens=4)


def test_windows_of_real_models_are_narrow_while_they_are_probed():
    text = build_language_model("mistral", sliding_window=128)
    forward = type(text.model).forward

    def leaks_beyond_its_window(self, inputs_embeds=None, position_ids=None, **kwargs):
        if inputs_embeds.shape[1] > self.config.sliding_window and kwargs.get("attention_mask") is None:
            position_ids = None
        return forward(self, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs)

    sizes = {"projection_dim": 16, "num_visual_tokens": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(text.model), "forward", leaks_beyond_its_window)
        model = MMGEMModel.from_towers(build_towers()[0], text, **sizes)
    assert model.config.sequence_packing == "block_mask"
    assert model.config.text_config.sliding_window == model.get_decoder().config.sliding_window == 128
    model = MMGEMModel.from_towers(build_towers()[0], build_language_model("gpt_neo", window_size=40), **sizes)
    with _narrow_windows(model):  # which it has as a table
        assert min(_Probe(model).lengths) > 40


def test_vectors_that_are_no_words_are_read():
    """Gemma 4 looks up further embeddings by the words that its vectors are, or raises an error."""
    fields = LLAMA | {"head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
    text = AutoModelForCausalLM.from_config(Gemma4TextConfig(**fields, sliding_window=4))
    with pytest.raises(ValueError, match="`text` is a `gemma4_text` model .* reads vectors in the place of tokens"):
        MMGEMModel.from_towers(build_towers()[0], text, num_visual_tokens=4)


def test_the_probe_leaves_random_numbers_modes_and_configuration_alone():
    model = compose("gpt2").train()  # with dropout
    state, fields = torch.get_rng_state(), model.config.to_dict()
    assert probe_language_model(model) == "position_ids"
    assert torch.equal(torch.get_rng_state(), state) and model.config.to_dict() == fields
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
