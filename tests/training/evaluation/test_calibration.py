import fresh_process
import pytest
import torch
from tiny_models import build_model
from torch.nn.functional import normalize

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.evaluation.calibration import calibrate, embed_modalities, modality_gap
from mmgem.training.inference import embed_fused, embed_images, embed_regions, embed_texts, remember, uncalibrated
from mmgem.training.scenes.dataset import SceneDataset

COUNT = 7
LOADER = """
import sys
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    image = model.get_image_features(inputs["pixel_values"]).pooler_output
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
torch.save([image, text], sys.argv[3])
"""


@pytest.fixture(scope="module")
def rows():
    return list(SceneDataset(3, COUNT, columns=["image", "captions", "boxes", "region_captions"]))


@pytest.fixture
def parts(tiny_model, tiny_processor, rows):
    """What the model gives for the rows by itself."""
    images, captions = [row["image"] for row in rows], [row["captions"][0] for row in rows]
    return {
        "image": embed_images(tiny_model, tiny_processor, images),
        "text": embed_texts(tiny_model, tiny_processor, captions),
        "fused": embed_fused(tiny_model, tiny_processor, images, captions),
    }


def test_means_are_those_of_the_three_modalities(tiny_model, tiny_processor, rows, parts):
    report = calibrate(tiny_model, tiny_processor, iter(rows), batch_size=3)
    assert report.counts == {"image": COUNT, "text": COUNT, "fused": COUNT}
    assert tiny_model.config.calibrated_modalities == ["text", "image", "fused"]
    for modality, embeds in parts.items():
        torch.testing.assert_close(tiny_model.calibrator.mean(modality), embeds.mean(0), rtol=0, atol=1e-5)
    assert report.gap_before == pytest.approx(modality_gap(parts), abs=1e-5)
    calibrated = embed_modalities(tiny_model, tiny_processor, rows)
    assert report.gap_after == pytest.approx(modality_gap(calibrated), abs=1e-5)
    assert report.gap_after < report.gap_before / 2


def test_what_comes_out_of_the_model_is_calibrated(tiny_model, tiny_processor, rows, parts):
    calibrate(tiny_model, tiny_processor, rows)
    for modality, embeds in embed_modalities(tiny_model, tiny_processor, rows, batch_size=2).items():
        expected = normalize(parts[modality] - parts[modality].mean(0), dim=-1)
        torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-4)
    images, boxes = [row["image"] for row in rows], [row["boxes"] for row in rows]
    regions = embed_regions(tiny_model, tiny_processor, images, boxes)
    with uncalibrated(tiny_model):
        plain = embed_regions(tiny_model, tiny_processor, images, boxes)
    torch.testing.assert_close(regions, normalize(plain - parts["image"].mean(0), dim=-1), rtol=0, atol=1e-4)


def test_calibrating_twice_is_calibrating_once(tiny_model, tiny_processor, rows):
    first = calibrate(tiny_model, tiny_processor, rows)
    means = {name: mean.clone() for name, mean in tiny_model.calibrator.state_dict().items()}
    second = calibrate(tiny_model, tiny_processor, rows)
    assert first == second
    assert all(torch.equal(tiny_model.calibrator.state_dict()[name], mean) for name, mean in means.items())


def test_batch_size_does_not_matter(tiny_model, tiny_processor, rows):
    whole = embed_modalities(tiny_model, tiny_processor, rows, batch_size=COUNT)
    for modality, embeds in embed_modalities(tiny_model, tiny_processor, rows, batch_size=2).items():
        torch.testing.assert_close(embeds, whole[modality], rtol=0, atol=1e-5)


def test_without_pairs_there_is_no_fused_modality(tiny_model, tiny_processor, rows):
    unpaired = [{"image": row["image"]} for row in rows[:4]] + [{"captions": row["captions"]} for row in rows[4:]]
    assert calibrate(tiny_model, tiny_processor, unpaired, batch_size=3).counts == {"image": 4, "text": 3}
    assert tiny_model.config.calibrated_modalities == ["text", "image"]
    with pytest.raises(ValueError, match="`modality` is 'fused'"):
        embed_fused(tiny_model, tiny_processor, [rows[0]["image"]], [""])


def test_several_images_are_one_fused_input(tiny_model, tiny_processor, rows):
    images = [row["image"] for row in rows]
    row = {"images": images[:2], "text": "two scenes"}
    embeds = embed_modalities(tiny_model, tiny_processor, [row])
    assert {modality: len(part) for modality, part in embeds.items()} == {"image": 2, "text": 1, "fused": 1}
    expected = embed_fused(tiny_model, tiny_processor, [images[:2]], ["two scenes"])
    torch.testing.assert_close(embeds["fused"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_model_embeds_as_before(tiny_processor, rows, tmp_path, dtype):
    build_model().to(dtype).save_pretrained(tmp_path / "model")
    model = MMGEMModel.from_pretrained(tmp_path / "model")
    calibrate(model, tiny_processor, rows)
    model.save_pretrained(tmp_path / "calibrated")
    loaded = MMGEMModel.from_pretrained(tmp_path / "calibrated")
    assert loaded.dtype == loaded.calibrator.mean("image").dtype == dtype
    expected = embed_modalities(model, tiny_processor, rows)
    for modality, embeds in embed_modalities(loaded, tiny_processor, rows).items():
        assert torch.equal(embeds, expected[modality])


@pytest.mark.slow
def test_saved_model_embeds_as_before_where_the_package_is_not(tiny_model, tiny_processor, rows, tmp_path):
    calibrate(tiny_model, tiny_processor, rows)
    tiny_model.save_pretrained(tmp_path / "model")
    images, captions = [row["image"] for row in rows], [row["captions"][0] for row in rows]
    inputs = tiny_processor(images=images, text=captions, return_tensors="pt")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    fresh_process.run(LOADER, "model", "inputs.pt", "outputs.pt", cwd=tmp_path, installed=False)
    image, text = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(image, embed_images(tiny_model, tiny_processor, images), rtol=0, atol=1e-5)
    torch.testing.assert_close(text, embed_texts(tiny_model, tiny_processor, captions), rtol=0, atol=1e-5)


def test_images_apart_from_texts_calibrate_no_fused_embeddings_but_leave_memories(tiny_model, tiny_processor, rows):
    images = [row["image"] for row in rows]
    before = remember(tiny_model, tiny_processor, images)
    apart = [{"image": image} for image in images] + [{"captions": row["captions"]} for row in rows]
    assert calibrate(tiny_model, tiny_processor, apart).counts == {"image": COUNT, "text": COUNT}
    assert torch.equal(remember(tiny_model, tiny_processor, images), before)
    with pytest.raises(ValueError, match=r"`modality` is 'fused'; expected one of .*\['text', 'image'\]"):
        embed_fused(tiny_model, tiny_processor, images, ["a star"] * COUNT)


def test_a_prompt_that_reads_is_calibrated_at_its_own_width(tiny_processor, rows):
    model = build_model(embedding_prompt_ids=[5, 6])
    report = calibrate(model, tiny_processor, rows)
    assert model.calibrator.dim == 32
    assert report.gap_after < report.gap_before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["captions"], "`rows` is of text inputs only; expected images and captions"),
        (["image"], "`rows` is of image inputs only; expected images and captions"),
        (None, "`rows` is of no inputs only; expected images and captions"),
        (["boxes", "region_captions"], "`rows` is of no inputs only"),  # each is left out
    ],
)
def test_rows_of_one_modality_are_refused(tiny_model, tiny_processor, rows, columns, message):
    sample = [{column: row[column] for column in columns} for row in rows] if columns else []
    with pytest.raises(ValueError, match=message):
        calibrate(tiny_model, tiny_processor, sample)


def test_a_refused_sample_leaves_the_model_as_it_was(tiny_model, tiny_processor, rows):
    calibrate(tiny_model, tiny_processor, rows)
    before = tiny_model.calibrator
    with pytest.raises(ValueError, match=r"\['text'\]` has shape \(1, 16\)"):
        calibrate(tiny_model, tiny_processor, rows[:1])
    assert tiny_model.calibrator is before
    assert tiny_model.config.calibrated_modalities == ["text", "image", "fused"]


def test_each_of_several_vectors_has_its_own_mean(tiny_processor, rows, tmp_path):
    model = build_model(num_embedding_tokens=3, embedding_pooling="multi_vector")
    plain = embed_modalities(model, tiny_processor, rows)
    report = calibrate(model, tiny_processor, rows, batch_size=3)
    assert report.counts == {"image": COUNT, "text": COUNT, "fused": COUNT}
    assert report.gap_before == pytest.approx(modality_gap(plain), abs=1e-5)
    assert report.gap_after < report.gap_before / 2
    calibrated = embed_modalities(model, tiny_processor, rows)
    for modality, embeds in plain.items():
        assert embeds.shape == (COUNT, 3, 16)
        torch.testing.assert_close(model.calibrator.mean(modality), embeds.mean(0), rtol=0, atol=1e-5)
        expected = normalize(embeds - embeds.mean(0), dim=-1)
        torch.testing.assert_close(calibrated[modality], expected, rtol=0, atol=1e-3)
    images, boxes = [row["image"] for row in rows], [row["boxes"] for row in rows]
    regions = embed_regions(model, tiny_processor, images, boxes)
    with uncalibrated(model):
        bare = embed_regions(model, tiny_processor, images, boxes)
    torch.testing.assert_close(regions, normalize(bare - plain["image"].mean(0), dim=-1), rtol=0, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = embed_modalities(MMGEMModel.from_pretrained(tmp_path), tiny_processor, rows)
    assert all(torch.equal(loaded[modality], embeds) for modality, embeds in calibrated.items())


def test_gap_by_hand():
    east, north, west = torch.eye(2)[:1], torch.eye(2)[1:], -torch.eye(2)[:1]
    assert modality_gap({"image": east, "text": 9 * west}) == pytest.approx(2)
    assert modality_gap({"image": east, "text": north}) == pytest.approx(2**0.5)
    assert modality_gap({"image": east, "text": east, "fused": north}) == pytest.approx(2**0.5)
    assert modality_gap({"image": torch.cat([east, west]), "text": torch.cat([north, -north])}) == 0
    several = torch.stack([east, west], dim=1)  # two vectors of one image
    assert modality_gap({"image": several, "text": north[:, None]}) == pytest.approx(1)
