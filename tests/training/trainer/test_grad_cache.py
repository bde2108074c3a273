import pytest
import torch
from joint_batches import joint_batch, joint_model
from one_step import rows
from tiny_models import build_model

from mmgem.contrastive import ContrastiveObjective
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.trainer.grad_cache import GradCache, RandomState, split_batch


@pytest.fixture
def batch(tiny_processor):
    """Four images, one of them without a text; two captions of one, boxes, a hard negative, an answer, a bare text."""
    torch.manual_seed(0)
    inputs = MMGEMCollator(tiny_processor)(rows()[:3])
    extra = torch.tensor([[9, 8, 7], [5, 6, 0], [4, 4, 4], [7, 8, 9]])
    width = inputs["input_ids"].shape[1]
    for name, values in {
        "input_ids": extra,
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]),
        "labels": torch.tensor([[9, 8, 7], [-100, -100, -100], [-100, 4, 4], [7, 8, 9]]),
    }.items():
        padding = -100 if name == "labels" else 0
        padded = torch.full((4, width), padding)
        padded[:, :3] = values
        inputs[name] = torch.cat([inputs[name], padded])
    one = inputs["image_index"].new_tensor
    inputs["image_index"] = torch.cat([inputs["image_index"], one([1, 2, 0, -1])])
    inputs["box_index"] = torch.cat([inputs["box_index"], one([-1, -1, -1, -1])])
    flags = torch.zeros(len(inputs["image_index"]), dtype=torch.bool)
    flags[-3] = True
    inputs["hard_negative_mask"] = flags
    inputs["contrastive_mask"] = torch.cat([inputs["contrastive_mask"], torch.tensor([True, True, False, False])])
    picture = torch.randn(1, *inputs["pixel_values"].shape[1:])
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], picture])
    inputs["boxes"] = torch.cat([inputs["boxes"], torch.zeros_like(inputs["boxes"][:1])])
    return inputs


def gradients(model):
    return {n: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()}


def direct(model, batch, num_items):
    outputs = model(**batch, num_items_in_batch=num_items)
    loss = outputs.caption_loss + outputs.contrastive_loss
    loss.backward()
    return loss.detach(), gradients(model)


def cached(model, batch, num_items, chunk_size):
    cache, chunks = GradCache(chunk_size), split_batch(batch, chunk_size)
    batches, states = cache.embed(model, chunks)
    loss, parts = cache.loss_and_gradients(batches, ContrastiveObjective())
    for chunk, state, gradient in zip(chunks, states, parts, strict=True):
        with state.replayed():
            outputs = model(**chunk, num_items_in_batch=num_items, return_contrastive_batch=True)
        (outputs.caption_loss + cache.surrogate(outputs.contrastive_batch, gradient)).backward()
        loss = loss + outputs.caption_loss.detach()
    return loss, gradients(model)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8])
def test_cached_gradient_is_the_gradient(batch, chunk_size):
    expected_loss, expected = direct(build_model(logit_bias_init_value=-1.0), batch, 20)
    loss, actual = cached(build_model(logit_bias_init_value=-1.0), batch, 20, chunk_size)
    torch.testing.assert_close(loss, expected_loss)
    assert expected["logit_scale"].abs() > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_texts_that_join_images_stay_with_them(chunk_size):
    """Images 0 and 1 are joined by a text; those of a second copy of the batch are not joined with them."""
    one = joint_batch()
    second = {**one, "image_ids": torch.tensor([5, 6]), "pixel_values": one["pixel_values"].flip(0)}
    batch = {"return_loss": True, "image_ids": torch.tensor([3, 4, 5, 6])}
    for name in one.keys() - {"return_loss"}:
        steps = {"image_index": 2, "fused_index": 2, "target_row": 9, "memory_row": 9}
        shifted = torch.where(second[name] >= 0, second[name] + steps[name], -1) if name in steps else second[name]
        batch[name] = torch.cat([one[name], shifted])
    chunks = split_batch(batch, chunk_size)
    assert [len(chunk["pixel_values"]) for chunk in chunks if "pixel_values" in chunk] == [2, 2]
    options = {"embedding_pooling": "multi_vector", "logit_bias_init_value": -1.0}
    expected_loss, expected = direct(joint_model(**options), batch, 20)
    loss, actual = cached(joint_model(**options), batch, 20, chunk_size)
    torch.testing.assert_close(loss, expected_loss)
    assert expected["image_vectors.key.weight"].any()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_texts_that_point_to_texts_of_other_images_join_them():
    batch = joint_batch(fused_index=torch.full((9,), -1), memory_row=torch.tensor([-1] * 4 + [6, 0] + [-1] * 3))
    chunks = split_batch(batch, 1)
    assert [len(chunk["input_ids"]) for chunk in chunks] == [9, 0]
    torch.testing.assert_close(chunks[0]["memory_row"], batch["memory_row"])


def test_texts_without_images_stay_with_the_texts_that_they_point_to():
    texts = torch.arange(8)
    batch = {
        "input_ids": texts[:, None] + 10,
        "attention_mask": torch.ones(8, 1, dtype=torch.long),
        "labels": torch.full((8, 1), -100),
        "pixel_values": torch.zeros(4, 3, 8, 8),
        "image_index": torch.tensor([-1, -1, 1, -1, -1, -1, -1, -1]),
        "target_row": torch.tensor([7, -1, -1, 2, -1, 4, -1, -1]),  # 3 finds the text of image 1; 0 and 5 texts alone
    }
    chunks = split_batch(batch, 2)
    words = [(chunk["input_ids"][:, 0] - 10).tolist() for chunk in chunks]
    assert sorted(sum(words, [])) == texts.tolist() and all(words)
    for own, chunk in zip(words, chunks, strict=True):
        pointing = (chunk["target_row"] >= 0).nonzero()[:, 0].tolist()
        assert {own[text]: own[chunk["target_row"][text]] for text in pointing}.items() <= {0: 7, 3: 2, 5: 4}.items()
    assert sum(int((chunk["target_row"] >= 0).sum()) for chunk in chunks) == 3


def test_pairs_need_no_numbers_of_images(pixel_values, text_batch):
    """Without `image_index`, text i describes image i."""
    chunks = split_batch({"pixel_values": pixel_values, **text_batch}, 2)
    assert [chunk["image_index"].tolist() for chunk in chunks] == [[0], [0, 1]]


def test_dropout_is_drawn_again_in_the_second_run(batch):
    """With dropout the cached gradient is that of the embeddings of the first run only if both draw the same."""
    model = build_model()
    model.language_model.config.attention_dropout = 0.5
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    cache, chunks = GradCache(2), split_batch(batch, 2)
    torch.manual_seed(3)
    first, states = cache.embed(model, chunks)
    for chunk, state, embedded in zip(chunks, states, first, strict=True):
        with state.replayed():
            again = model(**chunk, return_contrastive_batch=True).contrastive_batch
        torch.testing.assert_close(again.query_embeds, embedded.query_embeds)
        other = model(**chunk, return_contrastive_batch=True).contrastive_batch
        assert (other.query_embeds - embedded.query_embeds).abs().max() > 1e-3


def test_what_is_drawn_does_not_depend_on_the_steps_before(batch):
    """A run that is resumed begins with a fresh cache."""
    model = build_model()
    for layer in model.language_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    cache, chunks, states = GradCache(2), split_batch(batch, 2), []
    for used in (cache, cache, GradCache(2)):
        torch.manual_seed(3)
        used.embed(model, chunks)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_replaying_leaves_the_generator_where_it_was():
    state = RandomState(torch.device("cpu"))
    drawn = torch.rand(3)
    assert state.has_moved()
    with state.replayed():
        torch.testing.assert_close(torch.rand(3), drawn, rtol=0, atol=0)
    following = torch.rand(3)
    with state.replayed():
        torch.rand(3)
        torch.testing.assert_close(torch.rand(3), following, rtol=0, atol=0)


def test_chunks_hold_every_text_with_its_image(batch):
    chunks = split_batch(batch, 2)
    assert [len(chunk["pixel_values"]) for chunk in chunks] == [2, 2]
    assert sum(len(chunk["input_ids"]) for chunk in chunks) == len(batch["input_ids"])
    for chunk in chunks:
        for row, image in zip(chunk["input_ids"], chunk["image_index"], strict=True):
            whole = (batch["input_ids"] == row).all(-1).nonzero()[0, 0]
            original = batch["image_index"][whole]
            if original < 0:
                assert image == -1
            else:
                torch.testing.assert_close(chunk["pixel_values"][image], batch["pixel_values"][original])
    assert len(torch.cat([chunk["image_ids"] for chunk in chunks]).unique()) == 4
