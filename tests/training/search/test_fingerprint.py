import pytest
import torch
from image_folders import build_multi_vector_model
from tiny_models import build_model

from mmgem.training.search.fingerprint import KINDS, Fingerprint


def take(model, processor, kinds=tuple(KINDS)):
    return Fingerprint.take(model, processor, kinds)


def test_a_model_is_itself_also_rounded_or_loaded_again(tiny_processor, tmp_path):
    for build in (build_model, build_multi_vector_model):
        model = build()
        fingerprint = take(model, tiny_processor)
        assert set(fingerprint.probes) == set(KINDS)
        assert fingerprint.difference(take(model, tiny_processor)) is None
        model.save_pretrained(tmp_path)
        assert fingerprint.difference(take(type(model).from_pretrained(tmp_path), tiny_processor)) is None
        assert fingerprint.difference(take(build().bfloat16(), tiny_processor)) is None


@pytest.mark.parametrize(
    ("change", "changed_kinds"),
    [
        (lambda model: torch.nn.init.normal_(model.image_projection[1].weight), {"image", "weights"}),
        (lambda model: torch.nn.init.normal_(model.text_projection.weight), {"text", "fused", "weights"}),
        (lambda model: torch.nn.init.normal_(model.embedding_tokens), {"text", "fused", "memory", "weights"}),
        (lambda model: torch.nn.init.normal_(model.token_projection[1].weight), {"fused", "memory", "weights"}),
        (lambda model: None, set()),
    ],
)
def test_every_part_of_a_model_leaves_its_mark_on_the_probes_it_takes_part_in(tiny_processor, change, changed_kinds):
    model = build_model()
    before = take(model, tiny_processor)
    change(model)
    after = take(model, tiny_processor)
    for kind in KINDS:
        only = Fingerprint(before.settings, {kind: before.probes[kind]})
        expected = f"which {KINDS[kind]}" if kind in changed_kinds else None
        assert only.difference(after) == expected


def test_a_vocabulary_head_of_its_own_is_among_the_weights(tiny_processor):
    model = build_model(text="qwen3")
    before = take(model, tiny_processor)
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    assert before.difference(take(model, tiny_processor)) == "which has other weights"


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"num_embedding_tokens": 3}, "whose num_embedding_tokens is 3 instead of 2"),
        ({"embedding_pooling": "mean"}, "whose embedding_pooling is 'mean' instead of 'last'"),
        ({"text_attention": "bidirectional"}, "whose text_attention is 'bidirectional' instead of 'causal'"),
        ({"prompts": {"query": "Find: "}}, "whose prompts is {'query': 'Find: '} instead of None"),
        ({"projection_dim": 8}, "whose projection_dim is 8 instead of 16"),
    ],
)
def test_a_setting_that_changes_embeddings_is_named(tiny_processor, changes, clause):
    model, other = build_model(num_embedding_tokens=2), build_model(**{"num_embedding_tokens": 2, **changes})
    assert take(model, tiny_processor).difference(take(other, tiny_processor)) == clause


def test_no_prompts_are_none(tiny_processor):
    none, empty = (Fingerprint.take(build_model(prompts=prompts), tiny_processor, []) for prompts in (None, {}))
    assert none.difference(empty) is None


def test_another_view_of_images_and_another_length_of_texts_are_seen(tiny_processor, monkeypatch):
    model = build_model()
    before = take(model, tiny_processor)
    monkeypatch.setattr(tiny_processor.image_processor, "image_mean", [0.2, 0.2, 0.2])
    assert before.difference(take(model, tiny_processor)) == "which embeds images otherwise"
    monkeypatch.undo()
    monkeypatch.setattr(tiny_processor.tokenizer, "model_max_length", 8)
    assert before.difference(take(model, tiny_processor)) == "whose model_max_length is 8 instead of 200"


def test_a_calibrated_model_is_another_and_is_probed_for_what_it_is_calibrated_for(tiny_processor):
    model = build_model()
    before = take(model, tiny_processor, model.config.embedded_kinds)
    calibrated = build_model(calibrated_modalities=["image", "text"])
    generator = torch.Generator().manual_seed(0)
    calibrated.calibrator.fit({kind: torch.randn(5, 16, generator=generator) + 1 for kind in ("image", "text")})
    kinds = calibrated.config.embedded_kinds
    assert kinds == ["text", "image"]
    after = take(calibrated, tiny_processor, kinds)
    assert "calibrated_modalities" in before.difference(after)
    same_settings = Fingerprint(after.settings, before.probes)
    assert same_settings.difference(after) == "which embeds texts otherwise"


def test_text_and_weights_are_probed_without_the_vision_tower(tiny_processor, monkeypatch):
    model = build_model()
    monkeypatch.setattr(model.vision_tower, "forward", None)
    assert set(take(model, tiny_processor, ["text", "weights"]).probes) == {"text", "weights"}
    with pytest.raises(TypeError):
        take(model, tiny_processor, ["image"])


def test_weights_that_were_trained_a_little_are_other_weights(tiny_processor):
    model = build_model()
    before = take(model, tiny_processor, ["weights"])
    weight = model.get_input_embeddings().weight
    weight.data += 0.01 * weight.std() * torch.randn_like(weight)
    assert before.difference(take(model, tiny_processor, ["weights"])) == "which has other weights"
