"""k [EMB] vectors: kept apart, pooled, fewer, read by a prompt, and after a rationale."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import IMAGE_SIZE, build_model

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.late_interaction import similarity
from mmgem.modeling_mmgem import MMGEMModel

IMAGE_TOKEN = 299
N = 4  # visual tokens
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def tiny(**config) -> MMGEMModel:
    config = {"num_embedding_tokens": 4, "num_visual_tokens": N, "image_token_id": IMAGE_TOKEN, **config}
    return build_model(**config).eval()


def images(count=2):
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def fused_ids():
    return torch.cat([torch.full((2, N), IMAGE_TOKEN), IDS], dim=1), torch.cat([torch.ones(2, N).long(), MASK], dim=1)


def features_of_all_kinds(model):
    ids, mask = fused_ids()
    boxes = torch.tensor([[[0, 0, 0.5, 0.5], [0.2, 0.2, 1, 1]], [[0, 0, 1, 1], [0, 0, 0, 0]]])
    return {
        "image": model.get_image_features(images()).pooler_output,
        "regions": model.get_image_features(images(), boxes).pooler_output,
        "text": model.get_text_features(IDS, MASK).pooler_output,
        "fused": model.get_multimodal_features(ids, mask, images()).pooler_output,
    }


def fewer(model: MMGEMModel, count: int) -> MMGEMModel:
    """The same model, made to have only the first of its vectors."""
    small = copy.deepcopy(model)
    small.config.num_embedding_tokens = count
    small.embedding_tokens = torch.nn.Parameter(model.embedding_tokens[:count].detach())
    if small.image_vectors is not None:
        small.image_vectors.queries = torch.nn.Parameter(model.image_vectors.queries[: count - 1].detach())
    return small


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_first_vectors_are_what_fewer_tokens_encode(attention):
    model = tiny(embedding_pooling="multi_vector", text_attention=attention)
    for count in (1, 2, 3):
        few = features_of_all_kinds(fewer(model, count))
        for kind, embeds in features_of_all_kinds(model).items():
            assert embeds.shape[-2:] == (4, model.config.projection_dim)
            torch.testing.assert_close(embeds[..., :count, :], few[kind], atol=1e-5, rtol=1e-5)


def test_mean_and_last_are_those_of_the_vectors():
    kept_apart = tiny(embedding_pooling="multi_vector")
    expected = {"mean": lambda vectors: vectors.mean(-2), "last": lambda vectors: vectors[..., -1, :]}
    for pooling, reduce in expected.items():
        pooled = copy.deepcopy(kept_apart)
        pooled.set_embedding_tokens(4, pooling)
        for kind in ("text", "fused"):
            vectors, embeds = features_of_all_kinds(kept_apart)[kind], features_of_all_kinds(pooled)[kind]
            torch.testing.assert_close(embeds, reduce(vectors), atol=1e-5, rtol=1e-5)


def test_vectors_do_not_depend_on_padding_or_batch():
    model = tiny(embedding_pooling="multi_vector")
    embeds = model.get_text_features(IDS, MASK).pooler_output
    left = torch.tensor([[1, 1, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1]])
    torch.testing.assert_close(model.get_text_features(*left).pooler_output[0], embeds[1], atol=1e-5, rtol=1e-5)


def test_padding_boxes_have_vectors_of_zero():
    regions = features_of_all_kinds(tiny(embedding_pooling="multi_vector"))["regions"]
    assert not regions[1, 1].any() and regions[1, 0].any(dim=-1).all()


def test_pairs_are_compared_by_maxsim():
    model = tiny(embedding_pooling="multi_vector")
    outputs = model(input_ids=IDS, attention_mask=MASK, pixel_values=images(2))
    text, image = (F.normalize(features_of_all_kinds(model)[kind], dim=-1) for kind in ("text", "image"))
    expected = model.logit_scale.exp() * similarity(text, image)
    torch.testing.assert_close(outputs.logits_per_text, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.logits_per_image, expected.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "multi_vector"])
def test_more_vectors_begin_near_the_last_or_kept_apart_at_random(pooling):
    model = tiny(num_embedding_tokens=2, embedding_pooling="mean")
    before, image = model.embedding_tokens.detach().clone(), model.get_image_features(images()).pooler_output
    model.set_embedding_tokens(5, pooling)
    assert model.config.num_embedding_tokens == 5 and model.config.embedding_pooling == pooling
    torch.testing.assert_close(model.embedding_tokens[:2], before)
    assert len(model.embedding_tokens.detach().unique(dim=0)) == 5
    if pooling == "mean":
        assert (model.embedding_tokens[2:] - before[1]).abs().max() < 0.2
    else:
        words = model.get_input_embeddings().weight
        torch.testing.assert_close(model.embedding_tokens[2:].std(), words.std(), rtol=0.5, atol=0)
        torch.testing.assert_close(model.get_image_features(images()).pooler_output[:, 0], image)
    model.set_embedding_tokens(1, "last")
    torch.testing.assert_close(model.embedding_tokens, before[:1])
    assert model.image_vectors is None
    assert features_of_all_kinds(model)["text"].shape == (2, model.config.projection_dim)


def test_fewer_vectors_of_several_are_the_first_of_them():
    model = tiny(embedding_pooling="multi_vector")
    before = features_of_all_kinds(model)
    model.set_embedding_tokens(2, "multi_vector")
    for kind, embeds in features_of_all_kinds(model).items():
        torch.testing.assert_close(embeds, before[kind][..., :2, :], atol=1e-5, rtol=1e-5)
    model.set_embedding_tokens(3, "multi_vector")
    for kind, embeds in features_of_all_kinds(model).items():
        torch.testing.assert_close(embeds[..., :2, :], before[kind][..., :2, :], atol=1e-5, rtol=1e-5)


def test_a_changed_model_is_no_longer_calibrated():
    model = tiny(calibrated_modalities=["image", "text"])
    with pytest.raises(ValueError, match="mean is not known"):
        model.get_text_features(IDS, MASK)
    model.set_embedding_tokens(2, "mean")
    assert model.config.calibrated_modalities is None
    assert model.get_text_features(IDS, MASK).pooler_output.isfinite().all()


@pytest.mark.parametrize("change", [(0, "mean"), (2, "sum")])
def test_impossible_vectors_are_refused_and_leave_the_model(change):
    model = tiny()
    with pytest.raises(Exception, match="num_embedding_tokens|embedding_pooling"):
        model.set_embedding_tokens(*change)
    assert model.config.num_embedding_tokens == 4 and len(model.embedding_tokens) == 4


def test_a_changed_model_is_saved_and_loads(tmp_path):
    model = tiny(num_embedding_tokens=1)
    model.set_embedding_tokens(3, "multi_vector")
    model.save_pretrained(tmp_path)
    loaded = MMGEMModel.from_pretrained(tmp_path)
    for kind, embeds in features_of_all_kinds(model).items():
        torch.testing.assert_close(features_of_all_kinds(loaded)[kind], embeds)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_attention_is_what_it_is_called(attention):
    """Change the last word, and look at what the first became: it moves only if it sees ahead."""
    model = tiny(text_attention=attention)
    model._check_reading()  # which the first run does, by runs of its own
    states = []
    model.language_model.get_decoder().register_forward_hook(lambda *call: states.append(call[2].last_hidden_state))
    changed = IDS.clone()
    changed[0, 4] = 42
    for ids in (IDS, changed):
        model.get_text_features(ids, MASK)
    ids, mask = fused_ids()
    for last in (9, 42):
        ids[0, -1] = last
        model.get_multimodal_features(ids, mask, images())
    for one, other in (states[:2], states[2:]):
        moved = (one[0, 0] - other[0, 0]).abs().max()
        assert moved > 1e-4 if attention == "bidirectional" else moved == 0
        # Words never see [EMB], and what stands in the other row never moves.
        torch.testing.assert_close(one[1], other[1])


def test_generation_is_causal_in_a_model_that_reads_both_ways():
    model, causal = tiny(text_attention="bidirectional"), tiny(text_attention="causal")
    ids, mask = fused_ids()
    changed = ids.clone()
    changed[0, -1] = 42
    logits = [model(input_ids=i, attention_mask=mask, pixel_values=images()).logits for i in (ids, changed)]
    torch.testing.assert_close(logits[0][0, :-1], logits[1][0, :-1])
    torch.testing.assert_close(logits[0], causal(input_ids=ids, attention_mask=mask, pixel_values=images()).logits)


# Read by a prompt (E5-V)


def by_prompt(**config) -> MMGEMModel:
    return tiny(num_embedding_tokens=1, embedding_prompt_ids=[20, 21, 22], **config)


def test_a_prompt_is_read_at_its_last_token():
    model = by_prompt()
    plain = tiny(num_embedding_tokens=1)
    ids = torch.cat([IDS[:1], torch.tensor([[20, 21, 22]])], dim=1)
    expected = plain(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -1]  # (1, H)
    torch.testing.assert_close(model.get_text_features(IDS[:1]).pooler_output, expected, atol=1e-5, rtol=1e-5)


def test_images_are_read_by_the_same_prompt():
    model = by_prompt()
    bare = torch.full((2, N), IMAGE_TOKEN)
    expected = model.get_multimodal_features(bare, None, images()).pooler_output
    features = model.get_image_features(images())
    assert features.pooler_output.shape == (2, model.config.text_config.hidden_size)
    torch.testing.assert_close(features.pooler_output, expected, atol=1e-5, rtol=1e-5)
    whole = model.get_image_features(images(), torch.tensor([[[0, 0, 1, 1]]] * 2).float()).pooler_output[:, 0]
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)


def test_a_prompt_can_be_set_and_taken_back():
    model = tiny(num_embedding_tokens=1)
    before = model.get_text_features(IDS, MASK).pooler_output
    model.set_embedding_prompt([20, 21, 22])
    torch.testing.assert_close(
        model.get_text_features(IDS, MASK).pooler_output, by_prompt().get_text_features(IDS, MASK).pooler_output
    )
    with pytest.raises(ValueError, match="`embedding_prompt_ids` is"):
        model.set_embedding_prompt([300])
    model.set_embedding_prompt(None)
    torch.testing.assert_close(model.get_text_features(IDS, MASK).pooler_output, before)
    with pytest.raises(ValueError, match="`embedding_prompt_ids` excludes"):
        tiny(num_embedding_tokens=2).set_embedding_prompt([20])


def test_a_prompt_is_saved_with_the_model(tmp_path):
    model = by_prompt()
    model.save_pretrained(tmp_path)
    loaded = MMGEMModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.get_image_features(images()), model.get_image_features(images()))


def test_a_model_read_by_a_prompt_is_not_trained():
    with pytest.raises(ValueError, match="`return_loss`.*embedding_prompt_ids"):
        by_prompt()(input_ids=IDS, attention_mask=MASK, pixel_values=images(), return_loss=True)


@pytest.mark.parametrize(
    "config",
    [
        {"embedding_prompt_ids": []},
        {"embedding_prompt_ids": [300]},
        {"embedding_prompt_ids": [-1]},
        {"embedding_prompt_ids": [3], "num_embedding_tokens": 2},
        {"embedding_prompt_ids": [3], "embedding_pooling": "multi_vector"},
        {"num_embedding_tokens": 0},
    ],
)
def test_options_that_exclude_each_other_are_refused(config):
    with pytest.raises(Exception, match="|".join(config)):
        MMGEMConfig(**tiny().config.to_dict() | {"num_embedding_tokens": 1, **config})


# After a rationale (RGE)


def test_a_rationale_is_read_as_if_it_had_been_given():
    model = tiny()
    ids, _ = fused_ids()
    ids = ids[:, :-2]
    written = model.generate(input_ids=ids, pixel_values=images(), max_new_tokens=3, do_sample=False)
    assert written.shape[1] == ids.shape[1] + 3 and not (written[:, -3:] == 0).any()
    expected = model.get_multimodal_features(written, None, images()).pooler_output
    found = model.get_multimodal_features(ids, None, images(), max_rationale_tokens=3).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = model.get_multimodal_features(ids, None, images()).pooler_output
    assert (found - plain).abs().max() > 1e-3


def test_nothing_is_read_after_the_end_token():
    model = tiny()
    ids = fused_ids()[0][:, :-2]
    first = model.generate(input_ids=ids, pixel_values=images(), max_new_tokens=1, do_sample=False)[:, -1]
    model.generation_config.eos_token_id = [int(first[0])]  # so that the first row ends at once
    found = model.get_multimodal_features(ids, None, images(), max_rationale_tokens=3).pooler_output
    plain = model.get_multimodal_features(ids, None, images()).pooler_output
    torch.testing.assert_close(found[0], plain[0], atol=1e-5, rtol=1e-5)


def test_a_rationale_after_padding_is_refused():
    ids, mask = fused_ids()
    with pytest.raises(ValueError, match="`attention_mask` pads on the right"):
        tiny().get_multimodal_features(ids, mask, images(), max_rationale_tokens=3)
    with pytest.raises(ValueError, match="`max_rationale_tokens` is -1"):
        tiny().get_multimodal_features(ids, mask, images(), max_rationale_tokens=-1)


def test_of_an_empty_text_no_rationale_is_written():
    model = tiny()
    ids, mask = torch.tensor([[1, 1, 1], [5, 6, 7]]), torch.tensor([[0, 0, 0], [1, 1, 1]])
    both = model.get_multimodal_features(ids, mask, max_rationale_tokens=3).pooler_output
    torch.testing.assert_close(both[0], model.get_text_features(ids[:1], mask[:1]).pooler_output[0])
    expected = model.get_multimodal_features(ids[1:], mask[1:], max_rationale_tokens=3).pooler_output[0]
    torch.testing.assert_close(both[1], expected, atol=1e-5, rtol=1e-5)
    empty = model.get_multimodal_features(ids[:1, :0], mask[:1, :0], max_rationale_tokens=3).pooler_output
    torch.testing.assert_close(empty[0], both[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [-1, 2.5, "3", True])
def test_another_number_of_rationale_tokens_is_refused(count):
    with pytest.raises(ValueError, match=f"`max_rationale_tokens` is {count!r}; expected a whole number from 0"):
        tiny().get_multimodal_features(IDS, MASK, max_rationale_tokens=count)


def test_vectors_begin_as_tokens_that_read_what_these_would():
    model = tiny(num_embedding_tokens=1)
    for wrong in ([5], [5, 300], [-1, 5]):
        before = model.embedding_tokens
        with pytest.raises(
            ValueError, match="`token_ids` is .*; expected `num_embedding_tokens`, 2, numbers from 0 to 299"
        ):
            model.set_embedding_tokens(2, "last", token_ids=wrong)
        assert model.embedding_tokens is before and model.config.num_embedding_tokens == 1
    model.set_embedding_tokens(2, "last", token_ids=[7, 5])
    state = model.get_decoder()(torch.cat([IDS, torch.tensor([[7, 5]] * 2)], dim=1)[:1]).last_hidden_state[:, -1]
    torch.testing.assert_close(model.get_text_features(IDS[:1]).last_hidden_state[:, -1], state)
    assert model.embedding_tokens.requires_grad
