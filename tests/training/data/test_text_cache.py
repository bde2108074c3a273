"""States of a frozen language model after texts, in place of running it."""

import copy

import pytest
import torch
from PIL import Image
from tiny_models import build_model

from mmgem.text_rows import IGNORED_LABEL
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.feature_cache import FeatureCache
from mmgem.training.data.sources import DatasetSource
from mmgem.training.data.text_cache import check_frozen_texts, fill_texts, text_maker
from mmgem.training.trainer.grad_cache import split_batch
from mmgem.training.trainer.parameter_selection import set_trainable

TRAINED = ["pool_aggregator", "image_projection", "text_projection", "logit_scale"]
OPTIONS = {"hard_negatives_per_image": 1, "label_template": "a {label}", "long_caption_probability": 1.0}


@pytest.fixture(scope="module")
def rows():
    return [
        {"image": Image.new("RGB", (32, 32), color), "captions": [f"a {color} one", f"{color}"], "image_id": color}
        | {"boxes": [[0, 0, 16, 16]], "region_captions": [f"part of {color}"], "queries": [f"ein {color}"]}
        | {"long_caption": f"it is {color} all over", "label": color, "hard_negatives": [f"not {color}"]}
        | {"qa": [{"question": "which color?", "answer": color}], "draw_seed": number}
        for number, color in enumerate(("red", "navy", "lime"))
    ]


@pytest.fixture(scope="module")
def model():
    model = build_model(num_embedding_tokens=2, embedding_pooling="mean")
    set_trainable(model, train_only=TRAINED)
    return model.eval()


def filled(folder, model, collator, rows):
    return fill_texts(FeatureCache(folder, text_maker(model)), model, collator, [DatasetSource(rows)])


@pytest.mark.parametrize("prompt_name", [None, "query"])
def test_losses_and_gradients_are_those_of_the_language_model_in_the_loop(
    model, tiny_processor, rows, tmp_path, prompt_name
):
    rows = [row | {"prompt_name": prompt_name} for row in rows]
    collator = MMGEMCollator(tiny_processor, prompts={"query": "find: "}, **OPTIONS)
    collator.cached_texts = filled(tmp_path, model, collator, rows)
    batch = collator(rows)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
    assert batch["text_states"].shape == (len(batch["input_ids"]), 2, 32)
    looped = {name: value for name, value in batch.items() if name != "text_states"}
    results = []
    for inputs in (batch, looped):
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        results.append((outputs.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    chunk, *_ = split_batch(batch, 1)
    assert len(chunk["text_states"]) == len(chunk["input_ids"]) < len(batch["input_ids"])


def test_the_language_model_is_not_run_again(model, tiny_processor, rows, tmp_path, monkeypatch):
    collator = MMGEMCollator(tiny_processor)
    texts = filled(tmp_path, model, collator, rows[:2])
    assert len(texts.cache) == 2 * 5  # two captions, a query, the long caption, a region; the rest is not drawn
    before = set(tmp_path.iterdir())
    calls = []
    run = model.get_text_features
    monkeypatch.setattr(
        model, "get_text_features", lambda **inputs: calls.append(len(inputs["input_ids"])) or run(**inputs)
    )
    texts = filled(tmp_path, model, collator, [*rows, *rows])
    assert calls == [5] and len(texts.cache) == 15 and before < set(tmp_path.iterdir())
    monkeypatch.setattr(type(model), "_run_decoder", None)
    collator.cached_texts = texts
    batch = collator(rows)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
    assert model(**batch).loss.isfinite()


def test_what_the_states_do_not_fit_is_refused_by_name(model, tiny_processor, rows, tmp_path):
    collator = MMGEMCollator(tiny_processor)
    collator.cached_texts = filled(tmp_path, model, collator, rows[:2])
    with pytest.raises(ValueError, match="no states of 3 of 9 texts"):
        collator(rows)
    batch = collator(rows[:2])
    with pytest.raises(ValueError, match="`text_states` came with texts that are generated"):
        model(**batch)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
    with pytest.raises(ValueError, match="`text_states` has shape .*, those of the"):
        model(**{**batch, "text_states": batch["text_states"][:, :1]})
    with pytest.raises(ValueError, match="`text_states` has shape .*; expected "):
        model(**{**batch, "text_states": batch["text_states"][:-1]})
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embedding_tokens[0, 0] += 1e-6
    with pytest.raises(ValueError, match="language model with other weights"):
        FeatureCache(tmp_path, text_maker(other))
    other = copy.deepcopy(model)
    other.config.text_attention = "bidirectional"
    with pytest.raises(ValueError, match="made with `text_attention` causal instead of bidirectional"):
        FeatureCache(tmp_path, text_maker(other))


@pytest.mark.parametrize("part", ["language_model", "embedding_tokens", "token_projection"])
def test_parts_that_would_not_train_are_named(part):
    model = build_model()
    set_trainable(model, train_only=[*TRAINED, part])
    with pytest.raises(ValueError, match=f"`{part}.* trains; expected `train_only`"):
        check_frozen_texts(model)
    set_trainable(model, train_only=TRAINED)
    check_frozen_texts(model)
