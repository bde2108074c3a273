"""The share of each patch in the score of a text: exact where it is a sum, and refused where it is none."""

import pytest
import torch
import torch.nn.functional as F
from image_folders import build_multi_vector_model
from tiny_models import IMAGE_SIZE, TEXT_CONFIGS, build_model
from vision_towers import MECHANISMS, VISION_TOWERS

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.late_interaction import similarity
from mmgem.modality_calibrator import ModalityCalibrator
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.patch_grid import flat_patches

IDS = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])


def with_biases(model):
    for bias in (model.pool_aggregator.output.bias, model.image_projection[0].bias):
        torch.nn.init.normal_(bias)
    torch.nn.init.normal_(model.image_projection[0].weight, 1, 0.3)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return with_biases(build_model(num_visual_tokens=9))  # windows of 4 x 4 patches overlap


@pytest.fixture(scope="module")
def multi_vector_model():
    return with_biases(build_multi_vector_model(3, num_visual_tokens=9))


def pixels(count=2, height=IMAGE_SIZE, width=IMAGE_SIZE):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def scores(model, images, **kwargs):
    """(I, T), what the search has."""
    image_embeds = F.normalize(model.get_image_features(images, **kwargs).pooler_output, dim=-1)
    return similarity(F.normalize(model.get_text_features(IDS).pooler_output, dim=-1), image_embeds).T


def check_sum(model, images, **kwargs):
    shares = model.similarity_map(images, IDS, **kwargs)
    torch.testing.assert_close(shares.sum((2, 3)), scores(model, images, **kwargs), rtol=0, atol=1e-5)
    return shares


def by_gradient(model, image, query):
    """(rows, columns), by autograd: with weights, deviation and lengths held, the score is affine in what a patch is
    and what attention reads of it, so that gradient times value is the share, and the rest is that of biases."""
    aggregator, (norm, linear) = model.pool_aggregator, model.image_projection
    grid = model._patch_grid(image)
    (_, width, rows, columns), g, heads = grid.shape, aggregator.grid_size, aggregator.num_heads
    patches = grid[0].flatten(1).T.clone().requires_grad_()  # (P, C)
    values = aggregator.key_value(aggregator.norm(patches))[:, -width:].detach().requires_grad_()  # (P, C)
    keys = aggregator.key_value(aggregator.norm(patches))[:, :width].detach()
    tokens = []
    for row in range(g):
        for column in range(g):
            own = [
                y * columns + x
                for y in range(row * rows // g, -(-(row + 1) * rows // g))
                for x in range(column * columns // g, -(-(column + 1) * columns // g))
            ]
            pooled = patches[own].mean(0)
            query_ = aggregator.query(aggregator.norm(pooled.detach())).view(heads, -1)
            logits = torch.einsum("hd,whd->hw", query_, keys[own].view(len(own), heads, -1)) / query_.shape[1] ** 0.5
            found = torch.einsum("hw,whd->hd", logits.softmax(-1), values[own].view(len(own), heads, -1))
            tokens.append(pooled + aggregator.output(found.flatten()))
    mean = torch.stack(tokens).mean(0)
    deviation = (mean.var(unbiased=False) + norm.eps).sqrt().detach()
    embed = linear((mean - mean.mean()) / deviation * norm.weight + norm.bias)
    score = embed @ query / embed.detach().norm()
    to_patches, to_values = torch.autograd.grad(score, [patches, values])
    shares = (to_patches * patches + to_values * values).sum(-1)
    return (shares + (score - shares.sum()) / len(shares)).detach().view(rows, columns), score.detach()


@pytest.mark.parametrize("height, width", [(32, 32), (32, 48), (56, 24)])
def test_shares_are_those_of_a_plain_reference(model, height, width):
    images = pixels(1, height, width)
    shares = check_sum(model, images)
    for text, query in enumerate(F.normalize(model.get_text_features(IDS).pooler_output, dim=-1)):
        expected, score = by_gradient(model, images, query)
        torch.testing.assert_close(score, scores(model, images)[0, text], rtol=0, atol=1e-5)
        torch.testing.assert_close(shares[0, text], expected, rtol=0, atol=1e-5)


def test_without_attention_a_share_is_what_a_patch_brings_to_the_mean():
    model = build_model(num_visual_tokens=4).requires_grad_(False)
    torch.nn.init.zeros_(model.pool_aggregator.output.weight)
    images = pixels(1)
    patches = model._patch_grid(images)[0].flatten(1).T / 16  # (P, C), their sum the mean of the visual tokens
    mean = patches.sum(0)
    deviation = (mean.var(unbiased=False) + model.image_projection[0].eps).sqrt()
    embeds = (patches - patches.mean(-1, keepdim=True)) / deviation @ model.image_projection[1].weight.T  # (P, D)
    query = F.normalize(model.get_text_features(IDS).pooler_output, dim=-1)[0]
    expected = (embeds @ query / embeds.sum(0).norm()).view(4, 4)
    torch.testing.assert_close(model.similarity_map(images, IDS)[0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MECHANISMS)
def test_shares_of_every_kind_of_tower_sum_to_the_score(name):
    tower = VISION_TOWERS[name]
    config = {"vision_config": tower.config, "text_config": TEXT_CONFIGS["llama"]().to_dict(), "image_token_id": 1}
    torch.manual_seed(0)
    model = MMGEMModel(MMGEMConfig(**config, projection_dim=16, num_visual_tokens=4)).eval().requires_grad_(False)
    torch.nn.init.normal_(with_biases(model).pool_aggregator.output.weight, std=0.1)
    height, width = tower.image_size, tower.image_size * (2 if tower.any_size else 1)
    shares = check_sum(model, pixels(2, height, width))
    assert shares.shape[2:] == (height // tower.stride, width // tower.stride)


def test_images_that_keep_their_aspect_ratio_have_a_map_of_their_own(monkeypatch):
    model = with_biases(build_model("siglip2"))
    patches = [flat_patches(pixels(1, *size), 8)[0] for size in ((16, 32), (24, 16))]
    padded = torch.cat([F.pad(own, (0, 0, 0, 8 - own.shape[1]), value=9.0) for own in patches])
    spatial_shapes = torch.tensor([[2, 4], [3, 2]])
    shares = check_sum(model, padded, spatial_shapes=spatial_shapes)  # (2, T, 3, 4)
    for image, (rows, columns) in enumerate(spatial_shapes.tolist()):
        alone = model.similarity_map(patches[image], IDS, spatial_shapes=spatial_shapes[image : image + 1])[0]
        torch.testing.assert_close(shares[image, :, :rows, :columns], alone, rtol=0, atol=1e-5)
        assert not shares[image, :, rows:].any() and not shares[image, :, :, columns:].any()


def test_several_vectors_share_what_each_of_a_text_finds(multi_vector_model):
    model, images = multi_vector_model, pixels()
    shares = check_sum(model, images)
    queries = F.normalize(model.get_text_features(IDS).pooler_output, dim=-1)  # (T, 3, D)
    torch.testing.assert_close(model.similarity_map(images, query_embeds=7 * queries), shares, rtol=0, atol=1e-5)
    documents = F.normalize(model.get_image_features(images).pooler_output[:, :2, :9], dim=-1)
    fewer = model.similarity_map(images, query_embeds=queries[:, :1, :9], num_vectors=2)
    expected = similarity(F.normalize(queries[:, :1, :9], dim=-1), documents).T
    torch.testing.assert_close(fewer.sum((2, 3)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_a_calibrated_model_shares_its_calibrated_score(model, multi_vector_model, several, monkeypatch):
    model = multi_vector_model if several else model
    calibrator = ModalityCalibrator(16, ["image", "text"], 3 if several else None)
    embeds = {kind: torch.randn(5, *calibrator.embedding_shape) for kind in calibrator.modalities}
    calibrator.fit(embeds)
    before = model.similarity_map(pixels(), IDS)
    monkeypatch.setattr(model, "calibrator", calibrator)
    assert not torch.allclose(check_sum(model, pixels()), before, atol=1e-3)


def test_what_has_no_map_is_refused(model, multi_vector_model):
    with pytest.raises(ValueError, match="`input_ids` and `query_embeds` are both None"):
        model.similarity_map(pixels())
    with pytest.raises(ValueError, match="are both given"):
        model.similarity_map(pixels(), IDS, query_embeds=torch.ones(1, 16))
    with pytest.raises(ValueError, match=r"`query_embeds` has shape \(1, 17\); expected \(T, 16\)"):
        model.similarity_map(pixels(), query_embeds=torch.ones(1, 17))
    with pytest.raises(ValueError, match=r"`query_embeds` has shape \(1, 16\); expected \(T, k, 16\)"):
        multi_vector_model.similarity_map(pixels(), query_embeds=torch.ones(1, 16))
    with pytest.raises(ValueError, match="`num_vectors` is 4; expected 1 to 3"):
        multi_vector_model.similarity_map(pixels(), IDS, num_vectors=4)
    prompted = build_model()
    prompted.set_embedding_prompt([5, 6])
    with pytest.raises(ValueError, match="`embedding_prompt_ids` of the model"):
        prompted.similarity_map(pixels(), IDS)
