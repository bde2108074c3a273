"""Every mode of the model through sentence-transformers: boxes, prompts, calibration, rationales, narrow vectors."""

import json

import fresh_process
import pytest
import torch
from encoders import PROMPTS, calibrated_model, close, multi_vector_model, picture, prompted_model, unit_features
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from tiny_models import build_model

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing import save_sentence_transformer

PHOTO, OTHER = picture(0), picture(1, 32, 50)
BOX, BOXES = [5, 5, 30, 30], [[5, 5, 30, 30], [20, 10, 60, 40]]
LOADING = {"trust_remote_code": True, "device": "cpu"}


def encoder_of(model, processor, folder, **loading) -> SentenceTransformer:
    save_sentence_transformer(model, processor, folder)
    return SentenceTransformer(str(folder), **LOADING, **loading)


@pytest.fixture(scope="module")
def model() -> MMGEMModel:
    return build_model(prompts=PROMPTS)


@pytest.fixture(scope="module")
def folder(model, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single_vector")
    save_sentence_transformer(model, tiny_processor, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder) -> SentenceTransformer:
    return SentenceTransformer(str(folder), **LOADING)


# Boxes and several images


def test_a_region_is_an_image_of_its_own(encoder, model, tiny_processor):
    region = unit_features(model, tiny_processor, "image", images=PHOTO, boxes=[BOX])[:, 0]
    assert close(encoder.encode([{"image": PHOTO, "boxes": [BOX]}]), region)
    assert close(encoder.encode({"image": PHOTO, "boxes": [BOX]}), region[0])
    whole = encoder.encode([PHOTO])
    assert not close(whole, region)
    assert close(encoder.encode([{"image": PHOTO, "boxes": [[0, 0, 60, 40]]}]), torch.as_tensor(whole))
    assert close(encoder.encode([{"image": PHOTO, "boxes": None}]), torch.as_tensor(whole))


def test_boxes_beside_a_text_take_the_place_of_the_image(encoder, model, tiny_processor):
    def expected(text, **inputs):
        return unit_features(model, tiny_processor, "fused", text=text, **inputs)

    one = expected("<image>what color?", images=PHOTO, boxes=[[BOX]])
    assert close(encoder.encode([{"image": PHOTO, "boxes": [BOX], "text": "what color?"}]), one)
    assert close(encoder.encode([{"image": PHOTO, "boxes": torch.tensor([BOX]), "text": "what color?"}]), one)
    two = expected("<image><image>which is left?", images=PHOTO, boxes=[BOXES])
    texts = ("which is left?", "<image>which is left?", "<image><image>which is left?")
    embeddings = encoder.encode([{"image": PHOTO, "boxes": BOXES, "text": text} for text in texts])
    assert close(embeddings, two.expand(3, -1))
    assert not close(two, expected("<image>which is left?", images=PHOTO))


def test_boxes_of_several_images(encoder, model, tiny_processor):
    boxes = [BOXES, [[0, 0, 20, 20]]]
    fused = unit_features(
        model, tiny_processor, "fused", images=[PHOTO, OTHER], boxes=boxes, text="<image><image>and <image>"
    )
    assert close(encoder.encode([{"image": [PHOTO, OTHER], "boxes": boxes, "text": "<image>and <image>"}]), fused)


@pytest.mark.parametrize("batch_size", [3, 32])
def test_a_list_that_mixes_them(encoder, batch_size):
    inputs = [
        "a red star",
        {"image": PHOTO, "boxes": BOXES, "text": "which?"},
        {"image": OTHER, "boxes": [[0, 0, 20, 20]]},
        {"image": [PHOTO, OTHER], "text": "or"},
        {"image": OTHER, "boxes": [[0, 0, 20, 20]], "text": "<image>green"},
        {"image": PHOTO, "boxes": [BOX]},
        PHOTO,
        {"image": OTHER, "text": "what?"},
    ]
    alone = torch.stack([torch.as_tensor(encoder.encode(item)) for item in inputs])
    assert close(encoder.encode(inputs, batch_size=batch_size), alone)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": PHOTO, "boxes": BOXES}, "2 boxes without a text; expected one box, or a text"),
        ({"text": "a", "boxes": [BOX]}, "boxes without an image"),
        (
            {"image": PHOTO, "boxes": BOX},
            r"the boxes \[5, 5, 30, 30\]; expected a list of \[x0, y0, x1, y1\], at least",
        ),
        ({"image": PHOTO, "boxes": []}, r"the boxes \[\]; expected a list"),
        ({"image": PHOTO, "boxes": torch.zeros(0, 4)}, r"the boxes tensor\(.*\); expected a list"),
        ({"image": PHOTO, "boxes": "all"}, "the boxes 'all'; expected a list"),
        ({"image": PHOTO, "boxes": [[1, 2, 3]]}, r"the boxes \[\[1, 2, 3\]\]; expected a list"),
        ({"image": PHOTO, "boxes": [[30, 5, 5, 30]]}, "expected .* with x0 < x1"),
        ({"image": PHOTO, "boxes": [[100, 100, 120, 120]], "text": "a"}, "lies outside its image"),
        ({"image": [PHOTO, OTHER], "boxes": BOXES, "text": "a"}, "for each of 2 images"),
        ({"image": [PHOTO, OTHER], "boxes": [BOXES], "text": "a"}, "for each of 2 images"),
        ({"image": [PHOTO, OTHER], "boxes": [BOXES, []], "text": "a"}, "for each of 2 images, at least one"),
        (
            {"image": PHOTO, "boxes": BOXES, "text": "<image><image><image>"},
            "3 <image> placeholders for 1 images with 2",
        ),
    ],
)
def test_boxes_that_do_not_fit_are_named(encoder, item, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(["a", item])


def test_placeholders_are_counted_in_each_input(encoder):
    """In the batch their numbers agree, and images would change places."""
    inputs = [{"image": PHOTO, "text": "<image><image>"}, {"image": [PHOTO, OTHER, OTHER], "text": "<image><image>"}]
    with pytest.raises(ValueError, match="2 <image> placeholders for [13] images"):
        encoder.encode(inputs)


# Prompts


def test_prompts_are_those_of_the_config(encoder, model, tiny_processor):
    assert encoder.prompts == {"document": "", **PROMPTS}
    assert close(encoder.encode_query(["a star"]), unit_features(model, tiny_processor, text="find a star"))
    assert close(encoder.encode_document(["a star"]), unit_features(model, tiny_processor, text="a star"))
    with pytest.raises(ValueError, match="'object' not found"):
        encoder.encode(["a star"], prompt_name="object")


@pytest.mark.parametrize(
    "item",
    [
        {"image": PHOTO, "text": "in green"},
        {"image": PHOTO, "text": "<image>in green"},
        [{"role": "user", "content": [{"type": "image", "image": PHOTO}, {"type": "text", "text": "in green"}]}],
    ],
)
def test_a_prompt_stands_between_image_and_text(encoder, model, tiny_processor, item):
    edited = unit_features(model, tiny_processor, "fused", images=PHOTO, text="<image>the same, but in green")
    assert close(encoder.encode([item], prompt_name="edit"), edited)


def test_an_image_alone_has_no_place_for_a_prompt(encoder, model, tiny_processor):
    assert close(encoder.encode_query([PHOTO]), unit_features(model, tiny_processor, "image", images=PHOTO))
    fused = unit_features(model, tiny_processor, "fused", images=PHOTO, text="<image>find ")
    assert close(encoder.encode_query([{"image": PHOTO, "text": ""}]), fused)


def test_a_checkpoint_without_prompts_refuses_their_names(tiny_model, tiny_processor, tmp_path):
    encoder = encoder_of(tiny_model, tiny_processor, tmp_path)
    assert encoder.prompts == {"query": "", "document": ""}
    with pytest.raises(ValueError, match="'edit' not found"):
        encoder.encode(["a star"], prompt_name="edit")


def test_prompts_of_the_encoder_are_saved_with_the_model(folder, tmp_path):
    changed = SentenceTransformer(str(folder), prompts={"query": "look for ", "object": "the "}, **LOADING)
    changed.save(str(tmp_path / "changed"))
    expected = {"query": "look for ", "object": "the ", "edit": PROMPTS["edit"]}
    assert MMGEMModel.from_pretrained(tmp_path / "changed").config.prompts == expected
    again = SentenceTransformer(str(tmp_path / "changed"), **LOADING)
    assert again.prompts == {"document": "", **expected}


# What the model does with its embeddings


def assert_embeds_each_kind(encoder, model, processor):
    inputs = ["a star", PHOTO, {"image": PHOTO, "text": "a star"}, {"image": PHOTO, "boxes": [BOX]}]
    expected = [
        unit_features(model, processor, text="a star"),
        unit_features(model, processor, "image", images=PHOTO),
        unit_features(model, processor, "fused", images=PHOTO, text="<image>a star"),
        unit_features(model, processor, "image", images=PHOTO, boxes=[BOX])[:, 0],
    ]
    assert close(encoder.encode(inputs), torch.cat(expected))


def test_calibrated_embeddings(tiny_processor, tmp_path):
    model = calibrated_model()
    encoder = encoder_of(model, tiny_processor, tmp_path)
    assert_embeds_each_kind(encoder, model, tiny_processor)
    model.calibrator = None
    raw = unit_features(model, tiny_processor, "image", images=PHOTO)
    assert not close(encoder.encode([PHOTO]), raw)


def test_embeddings_read_by_a_prompt(tiny_processor, tmp_path):
    model = prompted_model()
    encoder = encoder_of(model, tiny_processor, tmp_path)
    assert encoder.get_embedding_dimension() == encoder[0].get_embedding_dimension() == 32
    assert_embeds_each_kind(encoder, model, tiny_processor)
    assert MultiVectorEncoder(str(tmp_path), **LOADING).get_embedding_dimension() == 32


def test_narrower_vectors(folder, encoder, model, tiny_processor):
    narrow = SentenceTransformer(str(folder), truncate_dim=6, **LOADING)
    assert narrow.get_embedding_dimension() == 6
    image = unit_features(model, tiny_processor, "image", images=PHOTO)[:, :6]
    assert close(narrow.encode([PHOTO]), image)
    assert close(encoder.encode([PHOTO], truncate_dim=6), image)
    unit = torch.nn.functional.normalize(image, dim=-1)
    assert close(encoder.encode([PHOTO], truncate_dim=6, normalize_embeddings=True), unit)


def test_a_rationale_is_read_before_the_embedding(encoder, model, tiny_processor):
    fused = tiny_processor(images=PHOTO, text="<image>which?", return_tensors="pt")
    text = tiny_processor(text="a star", return_tensors="pt")
    with torch.no_grad():
        expected = [
            model.get_multimodal_features(**inputs, max_rationale_tokens=3).pooler_output for inputs in (fused, text)
        ]
    inputs = [{"image": PHOTO, "text": "which?"}, "a star"]
    embeddings = encoder.encode(inputs, max_rationale_tokens=3)
    assert close(embeddings, torch.nn.functional.normalize(torch.cat(expected), dim=-1))
    assert not close(embeddings, torch.as_tensor(encoder.encode(inputs)))
    image = torch.as_tensor(encoder.encode([PHOTO]))
    assert close(encoder.encode([PHOTO], max_rationale_tokens=3), image)


# Everything once more, elsewhere

FRESH_PROCESS = """
import json, sys
from PIL import Image
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
photo = Image.open("photo.png")
edited = {"image": "photo.png", "boxes": [[5, 5, 30, 30]], "text": "in green"}
inputs = ["a star", photo, {"image": photo, "boxes": [[5, 5, 30, 30]]}, edited]
answers = {}
for name in sys.argv[1:]:
    for encoder_class in (SentenceTransformer, MultiVectorEncoder):
        encoder = encoder_class(name, trust_remote_code=True, device="cpu")
        saved = f"{name} of {encoder_class.__name__}"
        encoder.save(saved)
        again = encoder_class(saved, trust_remote_code=True, device="cpu")
        answers[saved] = [[row.tolist() for row in one.encode(inputs, prompt="a ")] for one in (encoder, again)]
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_every_mode_in_a_fresh_process_without_the_package(tiny_processor, tmp_path):
    models = {"several": multi_vector_model(), "calibrated": calibrated_model(), "prompted": prompted_model()}
    models["bidirectional"] = multi_vector_model(text_attention="bidirectional")
    PHOTO.save(tmp_path / "photo.png")
    for name, model in models.items():
        save_sentence_transformer(model, tiny_processor, tmp_path / name)
    output = fresh_process.run(FRESH_PROCESS, *models, cwd=tmp_path, installed=False)
    answers = json.loads(output.splitlines()[-1])
    for name, model in models.items():
        rows = [
            unit_features(model, tiny_processor, text="a a star"),
            unit_features(model, tiny_processor, "image", images=PHOTO),
            unit_features(model, tiny_processor, "image", images=PHOTO, boxes=[BOX])[:, 0],
            unit_features(model, tiny_processor, "fused", images=PHOTO, boxes=[[BOX]], text="<image>a in green"),
        ]
        several = torch.cat(rows)
        if several.ndim == 2:
            several = several[:, None]
        for embeddings in answers[f"{name} of SentenceTransformer"]:
            assert close(torch.tensor(embeddings), several[:, 0]), name
        for embeddings in answers[f"{name} of MultiVectorEncoder"]:
            assert close(torch.tensor(embeddings), several), name
