import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import build_model
from torch.nn.functional import normalize

from mmgem.modality_calibrator import ModalityCalibrator
from mmgem.modeling_mmgem import MMGEMModel

MODALITIES = ["image", "text", "fused"]
DIM = 8


@pytest.fixture
def embeds() -> dict[str, torch.Tensor]:
    """Embeddings of any length, each modality in a cone of its own."""
    generator = torch.Generator().manual_seed(0)
    cones = 3 * torch.eye(DIM)[:3]
    noise = torch.randn(3, 40, DIM, generator=generator)
    lengths = torch.rand(3, 40, 1, generator=generator) + 0.1
    return dict(zip(MODALITIES, (noise + cones[:, None]) * lengths, strict=True))


@pytest.fixture
def fitted(embeds) -> ModalityCalibrator:
    calibrator = ModalityCalibrator(DIM, MODALITIES)
    calibrator.fit(embeds)
    return calibrator


def test_means_and_embeddings_equal_a_plain_reference(fitted, embeds):
    for modality, rows in embeds.items():
        units = [row / sum(value**2 for value in row) ** 0.5 for row in rows]
        mean = sum(units) / len(units)
        torch.testing.assert_close(fitted.mean(modality), mean)
        expected = torch.stack([(unit - mean) / (unit - mean).square().sum().sqrt() for unit in units])
        torch.testing.assert_close(fitted(rows, modality), expected)


def test_what_one_thread_leaves_out_others_do_not(fitted, embeds):
    expected = fitted(embeds["text"], "text")
    with fitted.set_aside(), ThreadPoolExecutor(1) as other:
        assert fitted(embeds["text"], "text") is embeds["text"]
        assert torch.equal(other.submit(fitted, embeds["text"], "text").result(), expected)
        assert torch.equal(copy.deepcopy(fitted)(embeds["text"], "text"), expected)  # another calibrator
    assert torch.equal(fitted(embeds["text"], "text"), expected)


def test_two_opposite_directions_by_hand():
    calibrator = ModalityCalibrator(2, ["image", "text"])
    calibrator.fit({"image": torch.tensor([[5.0, 0], [0, 0.1]]), "text": torch.tensor([[1.0, 0], [-1, 0]])})
    assert calibrator.mean("image").tolist() == [0.5, 0.5]
    torch.testing.assert_close(calibrator(torch.tensor([2.0, 0]), "image"), torch.tensor([1, -1]) / 2**0.5)
    # Without a common direction nothing is taken away.
    torch.testing.assert_close(calibrator(torch.tensor([3.0, 4]), "text"), torch.tensor([0.6, 0.8]))


def test_output_is_of_unit_length_and_depends_on_the_direction_alone(fitted, embeds):
    calibrated = fitted(embeds["image"], "image")
    torch.testing.assert_close(calibrated.norm(dim=-1), torch.ones(40))
    torch.testing.assert_close(fitted(7 * embeds["image"], "image"), calibrated)


def test_batch_dimensions_do_not_matter(fitted, embeds):
    calibrated = fitted(embeds["text"], "text")
    torch.testing.assert_close(fitted(embeds["text"].view(4, 5, 2, DIM), "text"), calibrated.view(4, 5, 2, DIM))
    torch.testing.assert_close(fitted(embeds["text"][3], "text"), calibrated[3])


def test_the_gap_closes_and_other_modalities_are_others(fitted, embeds):
    before = [normalize(rows, dim=-1).mean(0) for rows in embeds.values()]
    after = [fitted(rows, modality).mean(0) for modality, rows in embeds.items()]
    assert torch.dist(before[0], before[1]) > 1
    assert all(mean.norm() < 0.1 for mean in after)
    assert not torch.allclose(fitted(embeds["image"], "image"), fitted(embeds["image"], "text"), atol=0.1)


def test_a_gap_hides_the_right_image_and_calibration_shows_it():
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(60, 16, generator=generator)
    gap = torch.zeros(2, 16)
    gap[0, 0], gap[1, 0] = 20, -20
    queries, captions = (content + 0.3 * torch.randn(60, 16, generator=generator) + gap[0] for _ in range(2))
    embeds = {"image": content + gap[1], "text": captions}
    calibrator = ModalityCalibrator(16, ["image", "text"])
    calibrator.fit(embeds)

    def found(queries, images, captions):
        """Share of the queries for which no wrong caption comes before the right image."""
        to_images = (normalize(queries, dim=-1) * normalize(images, dim=-1)).sum(-1)
        to_captions = normalize(queries, dim=-1) @ normalize(captions, dim=-1).T
        to_captions.fill_diagonal_(-1)
        return (to_images > to_captions.amax(-1)).float().mean()

    assert found(queries, embeds["image"], captions) == 0
    texts = calibrator(queries, "text"), calibrator(captions, "text")
    assert found(texts[0], calibrator(embeds["image"], "image"), texts[1]) > 0.95


def several_embeds() -> dict[str, torch.Tensor]:
    """(N, 3, D) embeddings of any length, each modality and each vector in a cone of its own, N by modality."""
    generator = torch.Generator().manual_seed(5)
    embeds = {}
    for number, modality in enumerate(MODALITIES):
        vectors = torch.randn(30 + number, 3, DIM, generator=generator)
        vectors += 3 * torch.eye(DIM)[number : number + 3]
        embeds[modality] = vectors * (torch.rand(30 + number, 3, 1, generator=generator) + 0.1)
    return embeds


def test_each_of_several_vectors_is_calibrated_as_if_it_were_the_only_one():
    embeds = several_embeds()
    several = ModalityCalibrator(DIM, MODALITIES, num_vectors=3)
    several.fit(embeds)
    for number in range(3):
        single = ModalityCalibrator(DIM, MODALITIES)
        single.fit({modality: vectors[:, number] for modality, vectors in embeds.items()})
        for modality, vectors in embeds.items():
            torch.testing.assert_close(several.mean(modality)[number], single.mean(modality))
            calibrated = several(vectors, modality)
            torch.testing.assert_close(calibrated[:, number], single(vectors[:, number], modality))
            assert calibrated[:, number].mean(0).norm() < 0.1
    # One mean of all vectors would leave each its own offset.
    assert torch.dist(several.mean("image")[0], several.mean("image")[1]) > 0.5


def test_batch_dimensions_do_not_matter_to_several_vectors():
    embeds = several_embeds()
    calibrator = ModalityCalibrator(DIM, MODALITIES, num_vectors=3)
    calibrator.fit(embeds)
    calibrated = calibrator(embeds["image"], "image")
    assert torch.equal(calibrator(embeds["image"].view(5, 6, 3, DIM), "image"), calibrated.view(5, 6, 3, DIM))
    assert torch.equal(calibrator(embeds["image"][4], "image"), calibrated[4])
    loaded = ModalityCalibrator(DIM, MODALITIES, num_vectors=3)
    loaded.load_state_dict(calibrator.state_dict())
    assert torch.equal(loaded(embeds["image"], "image"), calibrated)
    compiled = torch.compile(calibrator, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(embeds["image"], "image"), calibrated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors: vectors[:1], r"\['text'\]` has shape \(1, 3, 8\); expected \(2 or more, 3, 8\)"),
        (lambda vectors: vectors[:, :2], r"\['text'\]` has shape \(31, 2, 8\); expected \(2 or more, 3, 8\)"),
        (lambda vectors: vectors[:, 0], r"\['text'\]` has shape \(31, 8\); expected \(2 or more, 3, 8\)"),
        (lambda vectors: vectors * torch.tensor([1, 0, 1])[:, None], r"\['text'\]` has rows of zeros"),
        (
            lambda vectors: torch.cat([vectors[:, :2], vectors[:1, 2:].expand(31, -1, -1)], dim=1),
            r"\['text'\]` has 31 rows that are all alike in vector 2",
        ),
    ],
)
def test_bad_samples_of_several_vectors_are_refused(change, message):
    embeds = several_embeds()
    with pytest.raises(ValueError, match=message):
        ModalityCalibrator(DIM, MODALITIES, num_vectors=3).fit({**embeds, "text": change(embeds["text"])})


def test_another_number_of_vectors_is_refused(fitted):
    embeds = several_embeds()
    several = ModalityCalibrator(DIM, MODALITIES, num_vectors=3)
    several.fit(embeds)
    # Means of the others would be taken from them by broadcasting.
    for wrong in (embeds["image"][:, :1], embeds["image"][:, 0], embeds["image"][0, 0]):
        with pytest.raises(ValueError, match=r"expected \(..., 3, 8\)"):
            several(wrong, "image")
    with pytest.raises(ValueError, match=r"shape \(30, 3, 8\); expected \(2 or more, 8\)"):
        fitted.fit(embeds)
    with pytest.raises(ValueError, match="`num_vectors` is 0; expected at least 1"):
        ModalityCalibrator(DIM, MODALITIES, num_vectors=0)


def test_gradients_reach_the_embeddings_and_stay_across_them(fitted, embeds):
    rows = embeds["image"].clone().requires_grad_()
    fitted(rows, "image").sum(-1).square().sum().backward()
    assert (rows.grad.abs().amax(-1) > 1e-4).all()
    # The length of an embedding does not matter, so no gradient points along it.
    torch.testing.assert_close((rows.grad * embeds["image"]).sum(-1), torch.zeros(40), rtol=0, atol=1e-5)
    assert not list(fitted.parameters())


def test_half_precision_is_float32_rounded_once(fitted, embeds):
    rows = embeds["image"].bfloat16()
    calibrated = fitted(rows, "image")
    assert calibrated.dtype == torch.bfloat16
    assert torch.equal(calibrated, fitted(rows.float(), "image").bfloat16())


def test_fitting_again_forgets_and_a_refused_sample_changes_nothing(fitted, embeds):
    before = {name: mean.clone() for name, mean in fitted.state_dict().items()}
    with pytest.raises(ValueError, match="'fused'"):  # the last to be looked at
        fitted.fit({"image": embeds["text"], "text": embeds["image"], "fused": embeds["fused"][:1]})
    assert all(torch.equal(fitted.state_dict()[name], mean) for name, mean in before.items())
    fitted.fit({**embeds, "image": -embeds["image"]})
    torch.testing.assert_close(fitted.mean("image"), -before["image_mean"])


def test_state_dict_round_trip(fitted, embeds):
    assert set(fitted.state_dict()) == {"image_mean", "text_mean", "fused_mean"}
    # By name, not by place.
    loaded = ModalityCalibrator(DIM, MODALITIES[::-1])
    loaded.load_state_dict(fitted.state_dict())
    for modality, rows in embeds.items():
        assert torch.equal(loaded(rows, modality), fitted(rows, modality))


def test_one_graph(fitted, embeds):
    compiled = torch.compile(fitted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(embeds["image"], "image"), fitted(embeds["image"], "image"))


@pytest.mark.parametrize(
    "modalities", [[], ["image"], ["text", "text"], ["image", "image", "text"], ["image", "sound"]], ids=str
)
def test_modalities_must_be_two_of_those_there_are(modalities):
    with pytest.raises(ValueError, match=r"`modalities` is .*expected at least two different ones of \['text'"):
        ModalityCalibrator(DIM, modalities)


def test_width_must_be_positive():
    with pytest.raises(ValueError, match="`dim` is 0"):
        ModalityCalibrator(0, MODALITIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.ones(1, DIM)}, r"\['image'\]` has shape \(1, 8\); expected \(2 or more, 8\)"),
        ({"text": torch.ones(5, DIM + 1)}, r"\['text'\]` has shape \(5, 9\)"),
        ({"text": torch.ones(DIM)}, r"\['text'\]` has shape \(8,\)"),
        ({"fused": torch.eye(DIM) / torch.eye(DIM)[0]}, r"\['fused'\]` has values that are not finite"),
        ({"fused": torch.eye(DIM).cumsum(0) - torch.eye(DIM)[:1]}, r"\['fused'\]` has rows of zeros"),
        ({"image": torch.arange(1.0, 6)[:, None].expand(-1, DIM)}, r"\['image'\]` has 5 rows that are all alike"),
        ({"sound": torch.eye(DIM)}, r"holds \['image', 'text', 'fused', 'sound'\]"),
    ],
)
def test_bad_samples_are_refused(embeds, change, message):
    with pytest.raises(ValueError, match=message):
        ModalityCalibrator(DIM, MODALITIES).fit({**embeds, **change})


def test_a_sample_of_one_modality_is_refused(embeds):
    with pytest.raises(ValueError, match=r"holds \['image'\]; expected embeddings of each of \['image', 'text'\]"):
        ModalityCalibrator(DIM, ["image", "text"]).fit({"image": embeds["image"]})


def test_what_is_not_known_is_refused(fitted, embeds):
    with pytest.raises(ValueError, match="whose mean is not known; call `fit`"):
        ModalityCalibrator(DIM, MODALITIES)(embeds["image"], "image")
    two = ModalityCalibrator(DIM, ["image", "text"])
    two.fit({"image": embeds["image"], "text": embeds["text"]})
    with pytest.raises(ValueError, match=r"'fused'; expected one .* \['image', 'text'\]"):
        two(embeds["fused"], "fused")
    with pytest.raises(ValueError, match=r"`embeds` has shape \(2, 9\)"):
        fitted(torch.ones(2, DIM + 1), "image")


# ------------------------------------------------------------------------------------------------------- in the model


@pytest.fixture(params=["one vector", "two vectors"])
def calibrated_model(request) -> MMGEMModel:
    several = {"num_embedding_tokens": 2, "embedding_pooling": "multi_vector"}
    model = build_model(calibrated_modalities=MODALITIES, **several if request.param == "two vectors" else {})
    shape = (5, *model.calibrator.embedding_shape)
    generator = torch.Generator().manual_seed(3)
    model.calibrator.fit({name: torch.randn(shape, generator=generator) + 1 for name in MODALITIES})
    return model


def test_several_vectors_have_several_means_only_where_they_are_kept_apart():
    several = build_model(calibrated_modalities=MODALITIES, num_embedding_tokens=2, embedding_pooling="multi_vector")
    assert several.calibrator.embedding_shape == (2, 16)
    pooled = build_model(calibrated_modalities=MODALITIES, num_embedding_tokens=2, embedding_pooling="mean")
    assert pooled.calibrator.embedding_shape == (16,)


def features(model, pixel_values, text_batch):
    prompt = torch.cat([torch.ones(3, 4, dtype=torch.long), text_batch["input_ids"]], dim=1)
    boxes = torch.tensor([[[0.0, 0, 1, 1], [0, 0, 0, 0]]]).expand(3, -1, -1)
    with torch.no_grad():
        return {
            "image": model.get_image_features(pixel_values).pooler_output,
            "text": model.get_text_features(**text_batch).pooler_output,
            "fused": model.get_multimodal_features(prompt, pixel_values=pixel_values).pooler_output,
            "boxes": model.get_image_features(pixel_values, boxes).pooler_output,
        }


def test_every_embedding_of_the_model_is_calibrated_as_what_it_is(calibrated_model, pixel_values, text_batch):
    actual = features(calibrated_model, pixel_values, text_batch)
    calibrator, calibrated_model.calibrator = calibrated_model.calibrator, None
    plain = features(calibrated_model, pixel_values, text_batch)
    for modality in MODALITIES:
        torch.testing.assert_close(actual[modality], calibrator(plain[modality], modality))
    torch.testing.assert_close(actual["boxes"][:, 0], actual["image"])
    assert (actual["boxes"][:, 1] == 0).all()  # padding


def test_calibrator_is_saved_with_the_model(calibrated_model, pixel_values, text_batch, tmp_path):
    calibrated_model.save_pretrained(tmp_path)
    loaded = MMGEMModel.from_pretrained(tmp_path)
    assert loaded.config.calibrated_modalities == MODALITIES
    expected = features(calibrated_model, pixel_values, text_batch)
    for name, embeds in features(loaded, pixel_values, text_batch).items():
        assert torch.equal(embeds, expected[name])


def test_a_checkpoint_that_lacks_its_calibrator_is_not_answered_with(pixel_values, tmp_path):
    model = build_model()
    model.config.calibrated_modalities = MODALITIES
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks the weights calibrator.fused_mean, calibrator.image_mean"):
        MMGEMModel.from_pretrained(tmp_path).get_image_features(pixel_values)
