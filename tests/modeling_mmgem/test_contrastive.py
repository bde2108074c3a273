import math

import pytest
import torch
import torch.nn.functional as F

from mmgem.contrastive import contrastive_loss, token_row_ids


def loss_of(image_embeds, text_embeds, scale=1.0, text_to_image=None, image_ids=None, text_ids=None):
    return contrastive_loss(
        image_embeds,
        text_embeds,
        torch.tensor(scale),
        torch.arange(len(text_embeds)) if text_to_image is None else torch.tensor(text_to_image),
        torch.arange(len(image_embeds)) if image_ids is None else torch.tensor(image_ids),
        torch.arange(len(text_embeds)) if text_ids is None else torch.tensor(text_ids),
    )


def unit_rows(rows, dim=8, seed=0):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


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
    torch.testing.assert_close(loss_of(images, texts, 3.0, text_to_image), total / 8)


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


def test_no_texts_give_zero_with_gradients():
    images = unit_rows(2).requires_grad_()
    loss = loss_of(images, torch.zeros(0, 8))
    loss.backward()
    assert loss.item() == 0 and images.grad is not None


def test_token_row_ids_ignore_padding_and_see_order():
    rows = torch.tensor([[5, 6, 7, 0], [0, 5, 6, 7], [7, 6, 5, 0], [5, 6, 0, 0], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]])
    ids = token_row_ids(rows, mask).tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
