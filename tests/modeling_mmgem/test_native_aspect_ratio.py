"""SigLIP 2 NaFlex with its own processor: images keep their aspect ratio, and each is what it is alone."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import build_model
from transformers import Siglip2ImageProcessorPil

from mmgem.patch_grid import flat_patches
from mmgem.pool_aggregator import roi_align
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.trainer.grad_cache import split_batch

SIZES = [(90, 30), (40, 40), (30, 90), (64, 48)]  # (width, height)


@pytest.fixture(scope="module")
def model():
    return build_model("siglip2", image_token_id=1)


@pytest.fixture(scope="module")
def processor(tiny_processor):
    image_processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    return MMGEMProcessor(image_processor, tiny_processor.tokenizer, num_visual_tokens=4)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return [Image.effect_noise(size, 80).convert("RGB") for size in SIZES]


def test_an_image_is_the_same_alone_and_among_others(model, processor, images):
    boxes = [[[0, 0, *size], [0, 0, size[0] // 2, size[1]]] for size in SIZES]
    inputs = processor(images=images, boxes=boxes, return_tensors="pt")
    assert len({tuple(shape) for shape in inputs["spatial_shapes"].tolist()}) == 4
    together = model.get_image_features(inputs["pixel_values"], spatial_shapes=inputs["spatial_shapes"])
    regions = model.get_image_features(**inputs)
    torch.testing.assert_close(regions.pooler_output[:, 0], together.pooler_output, rtol=0, atol=1e-5)
    for number, (rows, columns) in enumerate(inputs["spatial_shapes"].tolist()):
        # Without any padding.
        patches = inputs["pixel_values"][number : number + 1, : rows * columns]
        tokens = model.vision_tower(
            patches,
            pixel_attention_mask=torch.ones(1, rows * columns, dtype=torch.long),
            spatial_shapes=torch.tensor([[rows, columns]]),
        ).last_hidden_state
        grid = tokens.mT.unflatten(2, (rows, columns))
        expected = model.pool_aggregator(grid)[0]
        torch.testing.assert_close(together.last_hidden_state[number], expected, rtol=0, atol=1e-5)
        half = model.pool_aggregator(roi_align(grid, torch.tensor([[[0.0, 0.0, 0.5, 1.0]]])))[0]
        torch.testing.assert_close(regions.last_hidden_state[number, 1], half, rtol=0, atol=1e-5)


def test_patches_are_those_of_the_image(model):
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    patches, spatial_shapes = flat_patches(pixel_values, 8)
    torch.testing.assert_close(model._patch_grid(patches, spatial_shapes), model._patch_grid(pixel_values))


def test_every_way_of_the_model_takes_them(model, processor, images, tiny_processor):
    texts = ["a red star", "a blue circle", "a moon", "a green star"]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    pairs = model(**inputs)
    alone = [model(**processor(images=image, text=texts, return_tensors="pt")).logits_per_image for image in images]
    torch.testing.assert_close(pairs.logits_per_image, torch.cat(alone), rtol=0, atol=1e-4)
    joint = model(**inputs, return_loss=True)
    torch.testing.assert_close(joint.image_embeds, pairs.image_embeds, rtol=0, atol=1e-5)
    captions = [f"<image>{text}" for text in texts]
    model.config.image_token_id = processor.image_token_id
    prompts = processor(images=images, text=captions, return_tensors="pt")
    prompts.pop("pixel_attention_mask")  # optional
    fused = model.get_multimodal_features(**prompts).pooler_output
    written = model.generate(**prompts, max_new_tokens=4, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    beams = model.generate(**prompts, max_new_tokens=4, do_sample=False, num_beams=2)
    assert len(beams) == 4
    for number, image in enumerate(images):
        own = processor(images=image, text=captions[number], return_tensors="pt")
        torch.testing.assert_close(
            model.get_multimodal_features(**own).pooler_output[0], fused[number], rtol=0, atol=1e-5
        )
        answer = model.generate(**own, max_new_tokens=4, do_sample=False)[0, own["input_ids"].shape[1] :]
        assert answer.tolist() == written[number, : len(answer)].tolist()
    model.config.image_token_id = 1


def test_a_training_batch_of_them_is_divided_for_grad_cache(model, processor, images):
    rows = [
        {"image": image, "captions": [caption], "boxes": [[0, 0, 20, 30]], "region_captions": ["a part"]}
        for image, caption in zip(images, ["a star", "a moon", "a circle", "a square"], strict=True)
    ]
    batch = MMGEMCollator(processor)(rows)
    chunks = split_batch(batch, 2)
    assert [len(chunk["spatial_shapes"]) for chunk in chunks] == [2, 2]
    embeds = [model(**chunk).image_embeds for chunk in chunks]
    whole = model(**batch)
    torch.testing.assert_close(torch.cat(embeds), whole.image_embeds, rtol=0, atol=1e-5)
    whole.loss.backward()
    assert F.normalize(model.pool_aggregator.query.weight.grad, dim=-1).isfinite().all()
    model.zero_grad()


@pytest.mark.parametrize(
    ("vision", "spatial_shapes", "message"),
    [
        ("siglip2", [[4, 5], [4, 4]], "`spatial_shapes` is .* for `pixel_values` of shape .*no more than there are"),
        ("siglip2", [[4, 4]], "`spatial_shapes` is "),
        ("siglip2", None, r"`pixel_values` has shape \(2, 16, 192\); expected \(B, 3, H, W\)"),
        ("clip", [[4, 4], [4, 4]], "`spatial_shapes` came with a vision tower `clip_vision_model`, which takes whole"),
    ],
)
def test_patches_that_do_not_fit_are_refused(vision, spatial_shapes, message):
    shapes = None if spatial_shapes is None else torch.tensor(spatial_shapes)
    with pytest.raises(ValueError, match=message):
        build_model(vision).get_image_features(torch.zeros(2, 16, 192), spatial_shapes=shapes)
