"""One rule for the scale at which files are decoded, wherever they are embedded, measured or trained on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.image_files import ImageReader, shorter_side_for
from mmgem.training.data.image_folder import FolderSource, read_image_folder
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.skipped import SkippedLog, readable_rows
from mmgem.training.data.sources import DatasetSource


@pytest.fixture
def folder(tmp_path):
    """A photograph, alone, and with a box."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((900, 600)).save(tmp_path / "a.jpg")
    rows = [{"file_name": "a.jpg", "text": "a"}] * 2
    rows[1] = rows[1] | {"boxes": [[0, 0, 450, 300]], "region_captions": ["b"]}
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def indexed(folder, tiny_processor):
    """The photograph as `mmgem index` reads it."""
    [[file]] = ImageReader(folder, shorter_side_for(tiny_processor)).read_batches(["a.jpg"], 1, [])
    assert file.image.size == (113, 75)  # 1/8, where the model sees 32 pixels
    return file.image


def test_what_is_measured_is_what_is_indexed(folder, indexed, tiny_processor):
    dataset = read_image_folder(folder)
    whole, boxed = readable_rows(dataset, tiny_processor, SkippedLog())
    assert whole["image"] == indexed and boxed["image"].size == (900, 600)
    assert dataset[0]["image"].size == (900, 600)  # of its owner nothing is changed


def test_what_is_trained_on_is_what_is_indexed(folder, indexed, tiny_processor):
    collator = MMGEMCollator(tiny_processor)
    source = FolderSource(folder)
    source.shorter_side = collator.shorter_side
    whole, boxed = source[0], source[1]
    assert whole["image"] == indexed and boxed["image"].size == (900, 600)
    pixel_values = tiny_processor(images=[indexed], return_tensors="pt")["pixel_values"]
    for row in (whole, {"image": folder / "a.jpg", "text": "a"}):
        torch.testing.assert_close(
            collator([row])["pixel_values"], pixel_values, rtol=0, atol=1e-6 if row is whole else 0.1
        )
    boxes = collator([boxed])["boxes"]
    torch.testing.assert_close(boxes, torch.tensor([[[0, 0, 0.5, 0.5]]]))


def test_a_crop_has_the_pixels_that_the_model_sees(tiny_processor):
    collator = MMGEMCollator(tiny_processor, augmentation={"min_crop": 0.03})
    assert collator.shorter_side == 427  # 64 / sqrt(0.03 * 3 / 4)
    views = [collator.augmentation_of_images.draw({}, (427, 427), seed).size for seed in range(200)]
    assert min(map(min, views)) >= 64


@pytest.fixture
def cropping_processor(tiny_processor):
    """One that resizes the shorter side, and then cuts out the middle."""
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return MMGEMProcessor(CLIPImageProcessorPil(**sizes), tiny_processor.tokenizer, num_visual_tokens=4)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1)])
def test_narrow_pictures_are_seen_as_any(tiny_model, tiny_processor, size):
    inputs = tiny_processor(images=[Image.new("RGB", size)], boxes=[[[0, 0, 1, 1]]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert tiny_model.get_image_features(**inputs).pooler_output.isfinite().all()


def test_narrow_pictures_that_would_become_huge_are_refused(cropping_processor):
    narrow, wide = Image.new("RGB", (1, 20_000)), Image.new("RGB", (900, 3))
    with pytest.raises(
        ValueError, match=r"`images\[1\]` has 1 x 20000 pixels; expected a longer side of at most 16384"
    ):
        cropping_processor(images=[wide, narrow], return_tensors="pt")
    assert cropping_processor(images=[wide], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
    skipped = SkippedLog()
    rows = [{"image": narrow, "text": "a"}, {"image": wide, "text": "b"}]
    assert [row is None for row in readable_rows(rows, cropping_processor, skipped)] == [True, False]
    mixture = Mixture([DatasetSource(rows)], None, seed=0, num_samples=4, skipped=skipped)
    mixture.check = MMGEMCollator(cropping_processor).check
    assert {mixture[position]["captions"][0] for position in range(4)} == {"b"}
    assert skipped.counts() == {"rows": 1, "data": 1}
