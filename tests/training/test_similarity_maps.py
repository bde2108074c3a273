"""Where a similarity map lies in a picture, and how it looks."""

import numpy as np
import pytest
import torch
from image_folders import write_noise
from PIL import Image
from tiny_models import build_model
from transformers import CLIPImageProcessorPil, Siglip2ImageProcessorPil

from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.inference import embed_images, embed_texts
from mmgem.training.similarity_maps import SimilarityMap, similarity_map


@pytest.fixture
def picture(tmp_path):
    write_noise(tmp_path / "wide.png", 0, (80, 40))
    return Image.open(tmp_path / "wide.png")


def with_image_processor(processor, image_processor):
    return MMGEMProcessor(image_processor, processor.tokenizer, num_visual_tokens=4)


def test_a_peak_is_where_a_window_has_the_largest_share():
    shares = torch.randn(5, 8, 6, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(shares, (1, 1, 1, 1))
    found = SimilarityMap(shares, (0, 0, 6, 8)).peaks() - 0.5
    for own, (column, row) in zip(padded, found.int().tolist(), strict=True):
        sums = {(y, x): own[y : y + 3, x : x + 3].sum().item() for y in range(8) for x in range(6)}
        assert max(sums, key=sums.get) == (row, column)


def test_a_peak_is_the_middle_of_a_patch():
    shares = torch.zeros(2, 2, 4)
    shares[0, 1, 3] = 1
    shares[1] -= 1
    shares[1, 0, 0] = -0.5
    peaks = SimilarityMap(shares, (10, 0, 50, 20)).peaks()
    assert peaks.tolist() == [[45, 15], [15, 5]]


def test_shares_of_a_picture_sum_to_what_its_embedding_scores(tiny_processor, picture):
    model = build_model()
    queries = embed_texts(model, tiny_processor, ["a star", "two moons"])
    found = similarity_map(model, tiny_processor, picture, queries)
    expected = embed_images(model, tiny_processor, [picture]) @ queries.T
    torch.testing.assert_close(found.shares.sum((1, 2))[None], expected, rtol=0, atol=1e-5)
    assert found.shares.shape == (2, 4, 4) and found.box == (0, 0, 80, 40)  # squashed, not cropped


def test_a_map_lies_where_the_model_looked(tiny_processor, picture):
    model, query = build_model(), torch.ones(1, 16)
    cropping = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = with_image_processor(tiny_processor, cropping)
    assert similarity_map(model, processor, picture, query).box == (20, 0, 60, 40)
    # Of 36 pixels, 4 at the right and at the bottom fill no patch of 8.
    model.config.vision_grid["image_size"] = (36, 36)
    uncropped = CLIPImageProcessorPil(size={"height": 36, "width": 36}, do_center_crop=False)
    model.vision_tower.config.image_size = 36
    found = similarity_map(model, with_image_processor(tiny_processor, uncropped), picture, query)
    assert found.shares.shape == (1, 4, 4) and found.box == pytest.approx((0, 0, 80 * 32 / 36, 40 * 32 / 36))


def test_a_picture_that_keeps_its_aspect_ratio_is_seen_whole(tiny_processor, picture):
    processor = with_image_processor(tiny_processor, Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16))
    found = similarity_map(build_model("siglip2"), processor, picture, torch.ones(1, 16))
    rows, columns = found.shares.shape[1:]
    assert columns > rows and found.box == (0, 0, 80, 40)


def test_the_largest_share_glows_where_it_is():
    shares = torch.zeros(1, 2, 4)
    shares[0, 1, 2] = 1
    drawn = np.asarray(SimilarityMap(shares, (0, 0, 80, 40)).draw(Image.new("RGB", (100, 40), "gray"))).astype(int)
    assert drawn.shape == (40, 100, 3)
    brightness = drawn.sum(-1)
    assert brightness[30, 50] == brightness.max() > brightness[30, 10] == brightness.min()
    assert (brightness[:, 80:] == brightness[:, 80:81]).all()  # beyond the patches: as the nearest
    even = np.asarray(SimilarityMap(torch.ones(1, 2, 4), (0, 0, 80, 40)).draw(Image.new("RGB", (80, 40), "gray")))
    assert (even == even[0, 0]).all()
