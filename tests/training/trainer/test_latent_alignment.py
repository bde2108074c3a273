"""Mixed pairs and kept neighbourhoods, against plain references and analytic values."""

import math

import pytest
import torch

from mmgem.training.trainer.contrastive_losses import build_objective
from mmgem.training.trainer.latent_alignment import mix_latents, neighbourhood_loss, structure_loss


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_batch():
    """Images 0 and 2 with two texts, 1 with one, 3 with none; text 2 is not compared."""
    return {
        "patch_features": random(4, 5, 2, 3),
        "text_states": random(6, 2, 7, seed=1),
        "image_index": torch.tensor([2, 0, 0, 1, 2, 0]),
        "contrastive_mask": torch.tensor([True, True, False, True, True, True]),
    }


def test_a_text_is_mixed_as_its_image_is():
    torch.manual_seed(0)
    partners = set()
    for _ in range(20):
        batch = a_batch()
        mixed = mix_latents(batch, 5.0)
        features, states = batch["patch_features"], batch["text_states"]
        # What an image was mixed with, and by which share, is solved for.
        found = []
        for image in range(3):
            for other in sorted(range(3), key=lambda other: other != image):  # itself first
                step, moved = features[other] - features[image], mixed["patch_features"][image] - features[image]
                share = (step * moved).sum() / (step * step).sum() if other != image else torch.zeros(())
                if torch.allclose(moved, share * step, atol=1e-5):
                    found.append((image, other, share))
                    break
        assert [image for image, *_ in found] == [0, 1, 2] and sorted(o for _, o, _ in found) == [0, 1, 2]
        shares = torch.stack([share for image, other, share in found if image != other] or [torch.zeros(())])
        torch.testing.assert_close(shares, shares[:1].expand_as(shares), atol=1e-4, rtol=0)
        texts_of = {0: [1, 5], 1: [3], 2: [0, 4]}
        for image, other, share in found:
            for number, text in enumerate(texts_of[image]):
                partner = texts_of[other][number % len(texts_of[other])]
                expected = states[text] + share * (states[partner] - states[text])
                torch.testing.assert_close(mixed["text_states"][text], expected, atol=1e-4, rtol=0)
        assert torch.equal(mixed["text_states"][2], states[2])
        assert torch.equal(mixed["patch_features"][3], features[3])
        assert torch.equal(batch["text_states"], a_batch()["text_states"])  # what was given stays
        partners.add(tuple(other for _, other, _ in found))
    assert len(partners) > 3


def test_a_large_alpha_mixes_by_half():
    torch.manual_seed(0)
    batch = {"patch_features": random(2, 5, 1, 1), "text_states": random(2, 1, 7)}
    batch |= {"image_index": torch.arange(2), "contrastive_mask": torch.ones(2, dtype=torch.bool)}
    draws = [mix_latents(batch, 1e6) for _ in range(8)]
    middle = batch["text_states"].mean(0, keepdim=True).expand(2, -1, -1)
    assert any(torch.allclose(draw["text_states"], middle, atol=1e-2) for draw in draws)


def test_what_cannot_be_mixed_is_refused():
    batch = a_batch()
    for name in ("patch_features", "text_states"):
        with pytest.raises(ValueError, match=f"`fusemix` came with a batch without `{name}`.*cache_features"):
            mix_latents({key: value for key, value in batch.items() if key != name}, 1.0)
    with pytest.raises(ValueError, match="came with boxes or hard negatives"):
        mix_latents(batch | {"boxes": torch.zeros(4, 1, 4)}, 1.0)
    with pytest.raises(ValueError, match="`structure` came with a batch without `text_states`"):
        build_objective(structure=1.0).regularization({"patch_features": random(2, 5, 1, 1)}, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusemix": 0}, "`fusemix` is 0.*above 0"),
        ({"structure": -1.0}, "`structure` is -1"),
        ({"structure_levels": 0}, "`structure_levels` is 0; expected 1 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_objective(**options)


def test_an_objective_does_what_its_options_ask_for():
    batch, images, texts = a_batch(), random(4, 6, seed=2), random(5, 6, seed=3)
    plain, mixing, keeping = build_objective(), build_objective(fusemix=0.5), build_objective(structure=3.0)
    assert plain.mixed(batch) is batch and keeping.mixed(batch) is batch
    torch.manual_seed(3)
    found = mixing.mixed(batch)
    torch.manual_seed(3)
    expected = mix_latents(batch, 0.5)
    assert all(torch.equal(found[name], expected[name]) for name in batch)
    assert plain.regularization(batch, images, texts) == mixing.regularization(batch, images, texts) == 0
    for levels in (1, 3):
        objective = build_objective(structure=3.0, structure_levels=levels)
        loss = objective.regularization(batch, images, texts)
        torch.testing.assert_close(loss, 3 * structure_loss(batch, images, texts, levels))
        assert loss > 0


@pytest.mark.parametrize("levels", [1, 3])
def test_neighbourhoods_of_an_isometry_are_kept(levels):
    latents = random(6, 4)
    rotation, _ = torch.linalg.qr(random(5, 4, seed=1))  # (5, 4), into more dimensions
    loss = neighbourhood_loss(latents, 3 * latents @ rotation.T, levels)
    assert 0 <= loss < 1e-5
    assert neighbourhood_loss(latents, random(6, 4, seed=2), levels) > 0.05


def test_the_divergence_is_ln_2_where_neighbours_are_exchanged():
    """Four vectors in pairs of near ones; afterwards each is near one of the other pair."""
    one, other = torch.eye(2)
    latents, embeds = torch.stack([one, one, other, other]), torch.stack([one, other, one, other])
    # Itself is a neighbour before and after, and the other half of the distribution moved: JS of halves is ln 2 / 2.
    loss = neighbourhood_loss(latents, embeds, 1)
    assert float(loss) == pytest.approx(math.log(2) / 2, abs=1e-4)


def test_levels_are_walks_as_in_a_plain_reference():
    latents, embeds = random(5, 3), random(5, 4, seed=1)

    def chain(vectors):
        rows = [vector / vector.norm() for vector in vectors]
        mean = sum(rows) / len(rows)
        return torch.stack(
            [torch.softmax(torch.stack([(a - mean) @ (b - mean) / 0.07 for b in rows]), 0) for a in rows]
        )

    before, after, total = chain(latents), chain(embeds), 0.0
    for level in (1, 2, 3):
        p, q = torch.matrix_power(before, level), torch.matrix_power(after, level)
        for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True):
            m = (a + b) / 2
            total += (a * math.log(a / m) + b * math.log(b / m)) / 2 / 5 / level / 3
    assert float(neighbourhood_loss(latents, embeds, 3)) == pytest.approx(total, rel=1e-4)


def test_gradients_reach_the_embeddings_alone_and_are_right():
    latents = random(4, 3).double().requires_grad_()
    embeds = random(4, 3, seed=1).requires_grad_()
    neighbourhood_loss(latents, embeds, 2).backward()
    assert latents.grad is None and torch.isfinite(embeds.grad).all()
    direction, step = random(4, 3, seed=2), 1e-2
    sides = [neighbourhood_loss(latents, embeds.detach() + sign * step * direction, 2) for sign in (1, -1)]
    slope = float(sides[0] - sides[1]) / (2 * step)
    assert float((embeds.grad * direction).sum()) == pytest.approx(slope, rel=0.05)
