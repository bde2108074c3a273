"""Losses of parts of embeddings: nested groups of vectors, and Matryoshka dimensions."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from contrastive_batches import image_batch, mixed_batch, unit_rows
from joint_batches import joint_batch, joint_model

from mmgem.contrastive import ContrastiveObjective
from mmgem.late_interaction import similarity
from mmgem.training.trainer.contrastive_losses import InfoNCE, build_objective


def several_vectors(k: int = 4, dim: int = 8):
    """The batch of `mixed_batch` with k vectors in the place of each."""
    batch = mixed_batch(dim=dim)
    sides = {}
    for seed, name in enumerate(("query_embeds", "target_embeds")):
        rows = unit_rows(len(batch[name]) * k, dim, seed).double()
        sides[name] = rows.view(-1, k, dim).requires_grad_()
    return replace(batch, **sides)


def sliced(batch, queries, targets, width=None):
    query_embeds, target_embeds = batch.query_embeds[:, :queries, :width], batch.target_embeds[:, :targets, :width]
    return replace(
        batch, query_embeds=F.normalize(query_embeds, dim=-1), target_embeds=F.normalize(target_embeds, dim=-1)
    )


def test_the_loss_of_groups_is_the_mean_of_those_of_each():
    batch, plain = several_vectors(), ContrastiveObjective()
    groups = [[1, 1], [2, 3], [4, 4]]
    loss = build_objective(vector_groups=groups)(batch)
    torch.testing.assert_close(loss, torch.stack([plain(sliced(batch, *group)) for group in groups]).mean())


def test_dimensions_stand_beside_the_whole():
    batch, plain = mixed_batch(), ContrastiveObjective()
    loss = build_objective(dimensions=[2, 4, 8])(batch)
    narrow = [
        plain(
            replace(
                batch,
                query_embeds=F.normalize(batch.query_embeds[:, :width], dim=-1),
                target_embeds=F.normalize(batch.target_embeds[:, :width], dim=-1),
            )
        )
        for width in (2, 4)
    ]
    torch.testing.assert_close(loss, torch.stack([plain(batch), *narrow]).mean())


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_of_several_vectors_the_first_group_is_narrowed(loss):
    batch = several_vectors()
    plain = build_objective(loss)
    views = [sliced(batch, 1, 2), sliced(batch, 4, 4), sliced(batch, 1, 2, width=4)]
    expected = torch.stack([plain(view) for view in views]).mean()
    objective = build_objective(loss, vector_groups=[[1, 2], [4, 4]], dimensions=[4])
    torch.testing.assert_close(objective(batch), expected)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_of_several_vectors_either_side_asks(loss):
    """MaxSim is not the same both ways: the loss is that of the two tables of scores, each side asking once."""
    texts, images = unit_rows(12, 8, 0).view(4, 3, 8), unit_rows(8, 8, 1).view(4, 2, 8)
    batch = image_batch(images, texts, scale=4.0, bias=-2.0)
    from_texts, from_images = 4 * similarity(texts, images), 4 * similarity(images, texts)  # each (4, 4)
    assert not torch.allclose(from_texts, from_images.T)
    own, signs = torch.arange(4), 2 * torch.eye(4) - 1
    expected = {
        "infonce": (F.cross_entropy(from_texts, own) + F.cross_entropy(from_images, own)) / 2,
        "sigmoid": -sum(F.logsigmoid(signs * (s - 2)).sum() / 4 for s in (from_texts, from_images)) / 2,
    }
    torch.testing.assert_close(build_objective(loss)(batch), expected[loss])


def test_gradients_are_those_of_the_mean():
    batch, groups = several_vectors(), [[1, 1], [4, 4]]
    build_objective(vector_groups=groups, dimensions=[3])(batch).backward()
    found = batch.query_embeds.grad.clone()
    assert torch.autograd.gradcheck(
        lambda query_embeds: build_objective(vector_groups=groups, dimensions=[3])(
            replace(several_vectors(), query_embeds=query_embeds)
        ),
        (batch.query_embeds.detach().requires_grad_(),),
        fast_mode=True,
    )
    assert found[:, 0].any() and found[:, 3].any()


def test_blocks_of_several_vectors_change_nothing(monkeypatch):
    objective = build_objective(vector_groups=[[2, 2], [4, 4]])
    whole, parts = several_vectors(), several_vectors()
    objective(whole).backward()
    monkeypatch.setattr("mmgem.contrastive.SCORES_AT_ONCE", 100)
    objective(parts).backward()
    torch.testing.assert_close(parts.query_embeds.grad, whole.query_embeds.grad)
    torch.testing.assert_close(parts.target_embeds.grad, whole.target_embeds.grad)


def test_one_step_teaches_the_narrow_parts():
    """A few steps on one batch: every budget learns to find, also the smallest."""
    model = joint_model(embedding_pooling="multi_vector", num_embedding_tokens=2).train()
    objective = build_objective(vector_groups=[[1, 1], [2, 2]], dimensions=[8])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        outputs = model(**joint_batch(), return_contrastive_batch=True)
        loss = objective(outputs.contrastive_batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = model(**joint_batch(), return_contrastive_batch=True).contrastive_batch
    for view in objective.views(batch):
        scores = objective.score(view.query_embeds, view.target_embeds)
        scores = scores.masked_fill(batch.query_modality[:, None] != batch.target_modality, -2)
        assert scores.argmax(dim=1).tolist() == batch.target_index.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector_groups": []}, "`vector_groups` is .*pairs"),
        ({"vector_groups": [[0, 1]]}, "above 0"),
        ({"vector_groups": [1, 2]}, "pairs"),
        ({"vector_groups": [[1, 2, 3]]}, "pairs"),
        ({"vector_groups": [[2, 2], [1, 4]]}, "nested groups, but .*does not hold"),
        ({"vector_groups": [[2, 2], [2, 2]]}, "nested"),
        ({"dimensions": []}, "`dimensions` is .*grow"),
        ({"dimensions": [4, 2]}, "`dimensions` is .*grow"),
        ({"dimensions": [0, 2]}, "`dimensions` is .*above 0"),
        ({"dimensions": ["x"]}, "`dimensions`"),
    ],
)
def test_parts_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_objective(**options)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"vector_groups": [[1, 1]]}, {}, "`embedding_pooling` is 'last'"),
        (
            {"vector_groups": [[1, 1], [2, 4]]},
            {"embedding_pooling": "multi_vector"},
            "at most `num_embedding_tokens`, 3",
        ),
        ({"dimensions": [16, 1000]}, {}, "at most `projection_dim`"),
        ({"loss": "sigmoid"}, {}, "`logit_bias_init_value` is None"),
        ({"loss": "sigmoid", "dimensions": [1000]}, {"logit_bias_init_value": -1.0}, "at most `projection_dim`"),
    ],
)
def test_parts_that_the_model_does_not_have_are_refused(options, config, message):
    with pytest.raises(ValueError, match=message):
        build_objective(**options).check(joint_model(**config).config)


def test_all_that_the_model_has_may_be_asked_for():
    config = joint_model(embedding_pooling="multi_vector").config
    groups = [[1, 1], [1, 2], [3, 2], [3, 3]]
    build_objective(vector_groups=groups, dimensions=[1, config.projection_dim]).check(config)
    with pytest.raises(ValueError, match="at most `num_embedding_tokens`, 3"):
        build_objective(vector_groups=[[1, 1], [2, 2], [2, 4]]).check(config)
    with pytest.raises(ValueError, match="`structure` is 1.0, but `embedding_pooling` is 'multi_vector'"):
        build_objective(structure=1.0).check(config)
    build_objective(structure=1.0).check(joint_model().config)


def test_dimensions_are_whole_numbers_wherever_they_come_from():
    with pytest.raises(ValueError, match=r"^`dimensions` is \['x'\]"):
        InfoNCE(dimensions=["x"])


def test_embeddings_without_the_parts_are_refused():
    with pytest.raises(ValueError, match="`vector_groups` goes up to"):
        build_objective(vector_groups=[[1, 1], [5, 5]])(several_vectors())
    with pytest.raises(ValueError, match="`vector_groups` goes up to"):
        build_objective(vector_groups=[[1, 1]])(mixed_batch())
    with pytest.raises(ValueError, match="`dimensions` goes up to 9; expected at most 8"):
        build_objective(dimensions=[9])(mixed_batch())
