import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_batches import image_batch, mixed_batch, part_of, unit_rows

from mmgem import contrastive
from mmgem.contrastive import ContrastiveObjective
from mmgem.contrastive_batch import IMAGE, REGION, REGION_BITS, ids_of_regions, token_row_ids


def loss_of(*args, **kwargs):
    return ContrastiveObjective()(image_batch(*args, **kwargs))


def test_equal_embeddings_give_log_batch_size():
    embeds = F.normalize(torch.ones(6, 4), dim=-1)
    assert loss_of(embeds, embeds).item() == pytest.approx(math.log(6), abs=1e-6)


def test_orthogonal_pairs_analytic():
    embeds = torch.eye(3)
    expected = -2.0 + math.log(math.exp(2.0) + 2)
    assert loss_of(embeds, embeds, scale=2.0).item() == pytest.approx(expected, abs=1e-6)


def test_one_caption_per_image_is_the_loss_of_clip():
    images, texts = unit_rows(5, seed=1), unit_rows(5, seed=2)
    logits = 3.0 * images @ texts.T
    target = torch.arange(5)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(loss_of(images, texts, scale=3.0), expected)


def test_captions_of_one_image_are_not_negatives_of_each_other():
    images, texts = unit_rows(2, seed=1), unit_rows(4, seed=2)
    text_to_image = [0, 0, 1, 1]
    logits = 3.0 * images @ texts.T
    total = 0.0
    for text, image in enumerate(text_to_image):
        others = [t for t, i in enumerate(text_to_image) if i != image]
        total += torch.logsumexp(logits[image, [text, *others]], 0) - logits[image, text]
        total += torch.logsumexp(logits[:, text], 0) - logits[image, text]
    torch.testing.assert_close(loss_of(images, texts, 3.0, target_index=text_to_image), total / 8)


def test_copies_of_an_image_are_not_negatives():
    images, texts = unit_rows(3, seed=1), unit_rows(3, seed=2)
    images[2] = images[1]
    loss = loss_of(images, texts, 3.0, image_ids=[7, 8, 8])
    pushed = torch.autograd.functional.jacobian(lambda t: loss_of(images, t, 3.0, image_ids=[7, 8, 8]), texts)
    # Moving text 1 along its own image helps; the copy beside it does not push back.
    assert loss < loss_of(images, texts, 3.0)
    assert (pushed[1] @ images[1]) < 0


def test_equal_texts_of_different_images_are_not_negatives():
    images, texts = unit_rows(2, seed=1), unit_rows(1, seed=2).expand(2, -1)
    assert loss_of(images, texts, 3.0, text_ids=[5, 5]).item() == pytest.approx(0.0, abs=1e-6)


def test_an_image_without_a_text_is_a_negative():
    images, texts = unit_rows(3, seed=1), unit_rows(2, seed=2)
    logits = 3.0 * texts @ images.T  # (2, 3)
    target = torch.arange(2)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :2].T, target)) / 2
    torch.testing.assert_close(loss_of(images, texts, 3.0), expected)


def test_a_hard_negative_is_a_candidate_and_never_an_anchor():
    images, texts = unit_rows(2, seed=1), unit_rows(3, seed=2)
    logits = 3.0 * images @ texts.T  # (2, 3)
    target = torch.arange(2)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :2].T, target)) / 2
    torch.testing.assert_close(loss_of(images, texts, 3.0, target_index=[0, 1, -1]), expected)


def test_a_hard_negative_that_is_true_of_an_image_is_none_for_it():
    images, texts = unit_rows(2, seed=1), unit_rows(3, seed=2)
    logits = 3.0 * images @ texts.T
    by_image = [logits[0, [0, 1]].logsumexp(0) - logits[0, 0], logits[1].logsumexp(0) - logits[1, 1]]
    by_text = F.cross_entropy(logits[:, :2].T, torch.arange(2))
    expected = (sum(by_image) / 2 + by_text) / 2
    torch.testing.assert_close(loss_of(images, texts, 3.0, target_index=[0, 1, -1], text_ids=[1, 2, 1]), expected)


def test_images_and_regions_add_their_losses():
    everything, images, regions = mixed_batch(), [0, 1, 2, 3, 4, 5, 11], [6, 7, 8]  # five that describe, and three
    batch = part_of(everything, images + regions, list(range(9)))
    of_images = part_of(everything, images, [0, 1, 2, 3])
    of_regions = part_of(everything, regions, [4, 5, 6, 7, 8])
    objective = ContrastiveObjective()
    torch.testing.assert_close(objective(batch), objective(of_images) + objective(of_regions))


def test_a_hard_negative_for_regions_is_none_for_images():
    images, texts = unit_rows(2, seed=1), unit_rows(3, seed=2)
    batch = image_batch(images, texts, 3.0, target_index=[0, 1, -1])
    batch.query_modality[2] = REGION
    torch.testing.assert_close(ContrastiveObjective()(batch), loss_of(images, texts[:2], 3.0))


@pytest.mark.parametrize(
    ("at_once", "vectors", "blocks"),
    [(12, (), [2, 2, 2]), (36, (3, 2), [2, 2, 2]), (36, (2, 3), [2, 2, 2]), (1, (), [1] * 6), (36, (), [6])],
)
def test_a_block_has_as_many_anchors_as_similarities_are_held_at_once(at_once, vectors, blocks, monkeypatch):
    """Similarities of each vector of 6 texts or 4 images. More blocks than one run again, for the gradients."""
    found = []

    class Recorded(ContrastiveObjective):
        def loss(self, pairs, rows):
            found.append(len(rows))
            return super().loss(pairs, rows)

    monkeypatch.setattr(contrastive, "SCORES_AT_ONCE", at_once)
    texts, images = (
        unit_rows(count * k, seed=k).view(count, *[k] * bool(vectors), 8).requires_grad_()
        for count, k in zip((6, 4), vectors or (1, 1))
    )
    Recorded()(image_batch(images, texts, target_index=[0, 1, 2, 3, 0, 1])).backward()
    assert found == blocks if len(blocks) == 1 else sorted(found) == sorted(blocks * 2)


def test_a_bias_changes_nothing_and_has_a_gradient():
    images, texts = unit_rows(3, seed=1), unit_rows(3, seed=2)
    batch = image_batch(images, texts, 3.0, bias=-10.0)
    batch.logit_bias.requires_grad_()
    loss = ContrastiveObjective()(batch)
    torch.testing.assert_close(loss, loss_of(images, texts, 3.0))
    assert torch.autograd.grad(loss, batch.logit_bias)[0].item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("rows", [([], [0, 1]), ([5], [0]), ([5, 11], []), ([], [])])
def test_without_describing_texts_the_loss_is_zero_with_gradients(rows):
    batch = part_of(mixed_batch(), *rows)
    loss = ContrastiveObjective()(batch)
    leaves = [batch.query_embeds, batch.target_embeds, batch.logit_scale, batch.logit_bias]
    assert loss.item() == 0
    assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(loss, leaves))


def test_a_lone_pair_has_no_negatives_and_no_loss():
    batch = part_of(mixed_batch(), [0], [0])
    loss = ContrastiveObjective()(batch)
    gradients = torch.autograd.grad(loss, [batch.query_embeds, batch.logit_scale])
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_the_loss_is_computed_in_float32():
    images, texts = unit_rows(5, seed=1), unit_rows(5, seed=2)
    expected = loss_of(images, texts, 50.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(images, texts, 50.0)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    half = loss_of(images.bfloat16(), texts.bfloat16(), 50.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss_of(images.bfloat16().float(), texts.bfloat16().float(), 50.0))


def test_hooks_change_the_score():
    class Halved(ContrastiveObjective):
        def score(self, query_embeds, target_embeds):
            return super().score(query_embeds, target_embeds) / 2

    images, texts = unit_rows(5, seed=1), unit_rows(5, seed=2)
    torch.testing.assert_close(Halved()(image_batch(images, texts, 3.0)), loss_of(images, texts, 1.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_embeds": unit_rows(3, dim=7)}, "`query_embeds` has 7 dimensions, but `target_embeds` has 8"),
        ({"target_embeds": unit_rows(3)[0]}, r"`target_embeds` has shape \(8,\)"),
        ({"query_ids": torch.arange(2)}, r"`query_ids` has shape \(2,\); expected \(3,\)"),
        ({"target_modality": torch.zeros(3, 1)}, r"`target_modality` has shape \(3, 1\); expected \(3,\)"),
        ({"target_index": torch.tensor([0, 3, 1])}, "`target_index` goes up to 3"),
        ({"query_modality": torch.tensor([IMAGE, REGION, IMAGE])}, "`query_modality` differs"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(changes, message):
    batch = image_batch(unit_rows(3, seed=1), unit_rows(3, seed=2))
    for name, value in changes.items():
        batch[name] = value
    with pytest.raises(ValueError, match=message):
        ContrastiveObjective()(batch)


def test_a_teacher_of_another_batch_is_refused():
    batch = mixed_batch()
    with pytest.raises(ValueError, match=r"`teacher` holds \(1, 1\) texts and targets; expected .*\(12, 9\)"):
        ContrastiveObjective()(batch, teacher=part_of(batch, [0], [0]))


def test_ids_of_regions_differ_between_and_within_images():
    ids = ids_of_regions(torch.tensor([1, 2**40 - 1]), 3)
    assert len(set(ids.flatten().tolist())) == 6
    assert ids.shape == (2, 3) and (ids >= 0).all()
    assert (ids >> REGION_BITS == torch.tensor([[1], [2**40 - 1]])).all()  # they still tell the image


def test_token_row_ids_ignore_padding_and_see_order():
    rows = torch.tensor([[5, 6, 7, 0], [0, 5, 6, 7], [7, 6, 5, 0], [5, 6, 0, 0], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    ids = token_row_ids(rows, mask).tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("token", [0, 1])
def test_no_token_counts_for_nothing(token):
    whole, cut = token_row_ids(torch.tensor([[5, token]] * 2), torch.tensor([[1, 1], [1, 0]])).tolist()
    assert whole != cut
