"""Placeholders, boxes, texts, the chat template and the round trip through a folder."""

import json

import fresh_process
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import build_towers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from transformers.tokenization_utils_base import LARGE_INTEGER

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor

N = 4  # visual tokens
WORDS = ["<pad>", "<eos>", "<unk>", "a", "red", "cat", "what", "is", "there", "?", "image", "<", ">"]
SQUARE = {"height": 32, "width": 32}
CLIP_VIEW = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}


def build_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**tokens, **kwargs})


def build_processor(image_processor=None, **kwargs) -> MMGEMProcessor:
    image_processor = image_processor or CLIPImageProcessorPil(**CLIP_VIEW)
    return MMGEMProcessor.from_towers(image_processor, build_tokenizer(**kwargs), num_visual_tokens=N)


@pytest.fixture
def processor() -> MMGEMProcessor:
    return build_processor()


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((64, 48), 80).convert("RGB")


# Texts and placeholders


def test_a_batch_of_images_and_texts(processor, image):
    inputs = processor(images=[image, image], text=["<image>", "<image> what is there ?"], return_tensors="pt")
    assert {name: (tuple(value.shape), value.dtype) for name, value in inputs.items()} == {
        "input_ids": ((2, N + 4), torch.int64),
        "attention_mask": ((2, N + 4), torch.int64),
        "pixel_values": ((2, 3, 32, 32), torch.float32),
    }
    assert processor.tokenizer.padding_side == "left"
    assert inputs.input_ids[0].tolist() == [0] * 4 + [processor.image_token_id] * N
    assert inputs.attention_mask.sum(1).tolist() == [N, N + 4]
    assert set(inputs) < set(processor.model_input_names)


@pytest.mark.parametrize(
    "size", [{"height": 64, "width": 64}, {"shortest_edge": 64}, 64], ids=["sides", "edge", "side"]
)
def test_a_call_may_resize_images_otherwise(processor, image, size):
    pixels = processor(images=[image], size=size, do_center_crop=False, return_tensors="pt")["pixel_values"]
    assert min(pixels.shape[2:]) == 64


def test_padding_side_is_the_tokenizers(processor):
    processor.tokenizer.padding_side = "right"
    assert processor(text=["a", "a cat"], return_tensors="pt").input_ids.tolist() == [[3, 0], [3, 5]]


def test_without_tensors_lists_come_out(processor):
    assert processor(text="a cat")["input_ids"] == [[3, 5]]


def test_texts_without_placeholders_go_with_any_number_of_images(processor, image):
    inputs = processor(images=image, text=["a", "cat", "red"], return_tensors="pt")
    assert (len(inputs.input_ids), len(inputs.pixel_values)) == (3, 1)


def test_several_images_in_one_text(processor, image):
    inputs = processor(images=[image] * 3, text=["<image>a<image>", "<image>"], return_tensors="pt")
    assert (inputs.input_ids == processor.image_token_id).sum(1).tolist() == [2 * N, N]


def test_batches_of_images_in_any_nesting(processor, image):
    pixels = np.stack([np.asarray(image)] * 2)
    expected = processor(images=[image, image], return_tensors="pt").pixel_values
    for images in ([[image], [image]], (image, image), pixels, torch.tensor(pixels).movedim(-1, 1), list(pixels)):
        assert torch.equal(processor(images=images, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize("return_tensors", ["pt", None])
@pytest.mark.parametrize("image_processor", [CLIPImageProcessorPil, Siglip2ImageProcessorPil])
def test_an_image_that_comes_several_times_is_prepared_once(image, image_processor, return_tensors, monkeypatch):
    options = {"max_num_patches": 64} if image_processor is Siglip2ImageProcessorPil else CLIP_VIEW
    processor, seen = build_processor(image_processor(**options)), []
    other, boxes = image.resize((30, 40)), [[[0, 0, 9, 9]], [[1, 2, 30, 30]], [[5, 5, 20, 25]]]
    of_clip = {"boxes": boxes} if image_processor is CLIPImageProcessorPil else {}
    expected = processor(images=[image, other, image.copy()], **of_clip, return_tensors=return_tensors)
    kind = type(processor.image_processor)
    run = kind.preprocess
    monkeypatch.setattr(kind, "preprocess", lambda *args, **kwargs: seen.append(args[1]) or run(*args, **kwargs))
    found = processor(images=[image, other, image], **of_clip, return_tensors=return_tensors)
    assert len(seen[0]) == 2  # then come blank ones, by which boxes are followed
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert len(found[name]) == 3
        for value, wanted in zip(found[name], values, strict=True):
            np.testing.assert_array_equal(value, wanted)


def test_empty_texts(processor):
    inputs = processor(text=["", ""], return_tensors="pt")
    assert inputs.input_ids.shape == inputs.attention_mask.shape == (2, 0)
    assert inputs.input_ids.dtype == inputs.attention_mask.dtype == torch.int64
    inputs = processor(text=["", "a"], return_tensors="pt")
    assert inputs.attention_mask.tolist() == [[0], [1]]


def test_long_texts_are_cut_where_the_tokenizer_says(image):
    processor = build_processor(model_max_length=8)
    assert processor(text="a " * 50, return_tensors="pt").input_ids.shape == (1, 3)  # beside N image tokens and [EMB]
    assert processor(text="a " * 50, max_length=3, return_tensors="pt").input_ids.shape == (1, 3)
    assert build_processor()(text="a " * 50, return_tensors="pt").input_ids.shape == (1, 50)
    inputs = processor(images=image, text="<image>" + "a " * 50, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == [processor.image_token_id] * N + [3] * 3


def test_image_tokens_are_never_cut(image):
    processor = build_processor(model_max_length=8)
    with pytest.raises(ValueError, match="max_length"):
        processor(images=[image, image], text="<image> a <image>", return_tensors="pt")


CALLS = [
    {"max_length": 2},
    {"max_length": 2, "truncation": True, "stride": 1},
    {"truncation": False},
    {"padding": "max_length", "max_length": 9},
    {"padding": False, "return_tensors": None},
    {"pad_to_multiple_of": 3},
    {"padding_side": "right"},
    {"text_kwargs": {"max_length": 2, "padding_side": "right"}},
]


@pytest.mark.parametrize("kwargs", CALLS)
@pytest.mark.parametrize("limit", [LARGE_INTEGER, 8])
def test_no_call_changes_what_comes_after_it_or_what_is_saved(kwargs, limit, tmp_path):
    texts = ["a " * 50, "a"]
    processor = build_processor(model_max_length=limit)
    expected = processor(text=texts, return_tensors="pt").input_ids.tolist()
    direct = processor.tokenizer(texts)["input_ids"]
    processor(text=texts, **({"return_tensors": "pt"} | kwargs))
    assert processor(text=texts, return_tensors="pt").input_ids.tolist() == expected
    processor(text=texts, **({"return_tensors": "pt"} | kwargs))
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")  # as pipelines do
    processor.save_pretrained(tmp_path)
    loaded = MMGEMProcessor.from_pretrained(tmp_path)
    again = MMGEMProcessor(
        processor.image_processor, AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), num_visual_tokens=N
    )
    for other in (loaded, again):
        assert other(text=texts, return_tensors="pt").input_ids.tolist() == expected
        assert other.tokenizer(texts)["input_ids"] == direct
        assert other.tokenizer.padding_side == "left"
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    assert settings["truncation"] is settings["padding"] is None


def test_the_limit_of_a_text_can_be_set_and_is_saved(image, tmp_path):
    processor = build_processor(model_max_length=99)
    processor(text="a " * 200, max_length=50)
    processor.save_pretrained(tmp_path)
    processor = MMGEMProcessor.from_pretrained(tmp_path)
    processor.tokenizer.model_max_length = 5
    processor.save_pretrained(tmp_path)
    by_argument = MMGEMProcessor.from_pretrained(tmp_path, model_max_length=7)
    for each, length in ((processor, 5), (MMGEMProcessor.from_pretrained(tmp_path), 5), (by_argument, 7)):
        assert each(text="a " * 50, return_tensors="pt").input_ids.shape == (1, length)
        assert each(images=image, text="<image>" + "a " * 50, return_tensors="pt").input_ids.shape == (1, N + length)


@pytest.mark.parametrize("limit", [0, -3, 2.5, "20", True])
def test_a_limit_that_is_none_is_refused(limit):
    processor = build_processor()
    processor.tokenizer.model_max_length = limit
    with pytest.raises(ValueError, match=rf"`model_max_length` is {limit!r}; expected a whole number of at least 1\."):
        processor(text="a", return_tensors="pt")


def test_texts_that_are_cut_are_counted_and_said_once(image, caplog):
    processor = build_processor(model_max_length=8)
    processor(text=["a a a", "a"], return_tensors="pt")
    assert processor.cut_texts == 0 and not caplog.messages
    processor(text=["a " * 4, "a", "a " * 9], return_tensors="pt")
    processor(images=image, text="<image>" + "a " * 4, return_tensors="pt")
    assert processor.cut_texts == 3
    assert len(caplog.messages) == 1 and "A text of 4 tokens was cut to 3." in caplog.messages[0]


# Boxes


@pytest.mark.parametrize("args", [(torch.bfloat16,), ("cpu", torch.bfloat16), ("cpu",)])
def test_boxes_keep_their_precision_when_pixels_do_not(processor, image, args):
    boxes = [[[1, 2, 43, 47.3]]]
    expected = processor(images=image, boxes=boxes, return_tensors="pt")["boxes"]
    inputs = processor(images=image, boxes=boxes, return_tensors="pt").to(*args)
    assert inputs["boxes"].dtype == torch.float32 and torch.equal(inputs["boxes"], expected)
    assert inputs["pixel_values"].dtype == (torch.bfloat16 if torch.bfloat16 in args else torch.float32)


def bright_extent(pixel_values: torch.Tensor) -> np.ndarray:
    """(3, H, W) with one bright rectangle on black -> its (x0, y0, x1, y1) as fractions of the view."""
    bright = pixel_values.mean(0)
    bright = (bright - bright.min()) / (bright.max() - bright.min()) > 0.5
    (ys, xs), (height, width) = np.nonzero(bright.numpy()), bright.shape
    return np.array([xs.min() / width, ys.min() / height, (xs.max() + 1) / width, (ys.max() + 1) / height])


IMAGE_PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}),
    "clip_smaller_crop": CLIPImageProcessorPil(size={"shortest_edge": 120}, crop_size={"height": 97, "width": 80}),
    "siglip": SiglipImageProcessorPil(size={"height": 96, "width": 96}),
    "siglip_oblong": SiglipImageProcessorPil(size={"height": 64, "width": 128}),
    "vit": ViTImageProcessorPil(size={"height": 96, "width": 96}),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 128}, crop_size={"height": 112, "width": 112}),
    "crop_only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 130, "width": 130}),
    "pad_only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 301, "width": 301}),
    "pad_below": SiglipImageProcessorPil(do_resize=False, do_pad=True, pad_size={"height": 256, "width": 256}),
}


@pytest.mark.parametrize("size", [(200, 140), (140, 200), (151, 151)])
@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_a_box_is_where_the_model_sees_it(name, size):
    processor = build_processor(IMAGE_PROCESSORS[name])
    for box in ([50, 40, 100, 110], [65, 60, 80, 75], [0, 0, 75, 90], [100, 20, size[0], size[1]]):
        image = Image.new("RGB", size)
        image.paste("white", tuple(box))
        inputs = processor(images=image, boxes=[[box]], return_tensors="pt")
        pixel = 1 / min(inputs.pixel_values.shape[-2:])
        assert np.abs(inputs.boxes[0, 0].numpy() - bright_extent(inputs.pixel_values[0])).max() <= 1.01 * pixel


def test_the_whole_image_is_the_whole_view():
    processor = build_processor(IMAGE_PROCESSORS["clip"])
    boxes = processor(images=Image.new("RGB", (200, 140)), boxes=[[[0, 0, 200, 140]]], return_tensors="pt").boxes
    assert boxes.tolist() == [[[0, 0, 1, 1]]]


def test_boxes_refer_to_the_image_as_displayed(tmp_path):
    image = Image.new("RGB", (60, 120))
    image.paste("white", (0, 0, 30, 30))  # shown turned by 90 degrees, at the top right
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    processor = build_processor(IMAGE_PROCESSORS["siglip"])
    inputs = processor(images=tmp_path / "turned.png", boxes=[[[90, 0, 120, 30]]], return_tensors="pt")
    assert np.abs(inputs.boxes[0, 0].numpy() - bright_extent(inputs.pixel_values[0])).max() <= 0.02


def test_different_numbers_of_boxes_are_padded_with_zeros(processor, image):
    boxes = [[[8, 0, 56, 48]], [], torch.tensor([[8, 0, 56, 24], [-5, 12, 900, 900.0]])]
    result = processor(images=[image] * 3, boxes=boxes, return_tensors="pt").boxes
    assert (result.shape, result.dtype) == ((3, 2, 4), torch.float32)
    zeros = [0, 0, 0, 0]
    expected = [[[0, 0, 1, 1], zeros], [zeros, zeros], [[0, 0, 1, 0.5], [0, 0.25, 1, 1]]]
    assert torch.allclose(result, torch.tensor(expected), atol=0.02)


def test_boxes_in_other_containers(processor, image):
    expected = processor(images=[image], boxes=[[[9, 0, 56, 48], [20, 9, 30, 30]]], return_tensors="pt").boxes
    rows = [[9, 0, 56, 48], [20, 9, 30, 30]]
    for boxes in (rows, [rows], np.array([rows]), torch.tensor([rows]), [[torch.tensor(row) for row in rows]]):
        assert torch.equal(processor(images=image, boxes=boxes, return_tensors="pt").boxes, expected)


def test_one_placeholder_for_each_image_or_each_box(processor, image):
    boxes = [[[8, 0, 56, 48], [20, 9, 30, 30]], [[8, 8, 20, 20]]]

    def image_tokens(text):
        input_ids = processor(images=[image, image], text=text, boxes=boxes, return_tensors="pt").input_ids
        return (input_ids == processor.image_token_id).sum(1).tolist()

    assert image_tokens(["<image> a", "<image>"]) == [2 * N, N]
    assert image_tokens(["<image> a", "<image>", "<image>"]) == [N, N, N]
    assert image_tokens(["<image> a <image> cat <image>"]) == [3 * N]
    assert image_tokens(["a", "cat", "red"]) == [0, 0, 0]
    with pytest.raises(ValueError, match="`text` has 4 <image> placeholders for 2 images with 3 boxes"):
        image_tokens(["<image>"] * 4)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[[5, 5, 3, 9]]], r"`boxes\[0\]\[0\]` is \[5.0, 5.0, 3.0, 9.0\]; expected .* x0 < x1"),
        ([[[9, 9, 20, 20], [5, 9, 8, 5]]], r"`boxes\[0\]\[1\]`.* y0 < y1"),
        ([[[5, 5, 5, 9]]], "x0 < x1"),
        ([[[70, 0, 80, 9]]], "lies outside its image; expected a box that overlaps the 64 x 48 pixels"),
        ([[[-9, 0, 0, 9]]], "lies outside its image"),
        ([[[0, 0, 4, 48]]], r"the model does not see: .* crops the image to \[7.6, 0.0, 56.4, 48.0\]"),
        ([[[0, 0, float("nan"), 9]]], "expected finite"),
        ([[[0, 0, float("inf"), 9]]], "expected finite"),
        ([[[0, 0, 9]]], r"`boxes\[0\]` has shape \(1, 3\)"),
        ([[0, 0, 9]], r"`boxes\[0\]` has shape \(3,\)"),
        ([[[0, 0, 9, 9], [0, 0, 9]]], "expected for each image a list"),
        ([["left"]], "expected for each image a list"),
        (5, "`boxes` is 5; expected for each image a list"),
        ([[[0, 0, 9, 9]], [[0, 0, 9, 9]]], "boxes of 2 images, but there are 1 images"),
        ([[]], "without any box"),
        ([], "boxes of 0 images"),
    ],
)
def test_bad_boxes_are_named(processor, image, boxes, message):
    with pytest.raises(ValueError, match=message):
        processor(images=image, boxes=boxes, return_tensors="pt")


def test_boxes_need_an_image_processor_that_can_be_followed(image):
    processor = build_processor(ConvNextImageProcessorPil(size={"shortest_edge": 64}))
    with pytest.raises(ValueError, match="ConvNextImageProcessorPil, which crops while resizing"):
        processor(images=image, boxes=[[[0, 0, 9, 9]]], return_tensors="pt")


# Bad input


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "`images` and `text` are both None"),
        ({"images": []}, ValueError, "`images` is empty"),
        ({"text": []}, ValueError, "`text` is an empty list"),
        ({"text": ["a", 3]}, TypeError, r"`text\[1\]` is a int, 3; expected a string"),
        ({"text": 3}, TypeError, r"`text\[0\]` is a int"),
        ({"text": "<image>"}, ValueError, "1 <image> placeholders for 0 images"),
        (
            {"text": ["<image><image>", "<image>"], "images": [np.zeros((9, 9))]},
            ValueError,
            "3 .* for 1 images; expected",
        ),
        ({"images": [np.zeros((9, 9)), "missing.png"]}, FileNotFoundError, r"`images\[1\]` \('missing.png'\)"),
        ({"images": [np.full((9, 9, 3), np.nan)]}, ValueError, r"`images\[0\]` .*NaN"),
        ({"images": [None]}, TypeError, r"`images\[0\]` is a NoneType"),
        ({"text": "a", "boxes": [[[0, 0, 1, 1]]]}, ValueError, "`boxes` was given without `images`"),
        ({"text": "a", "videos": [1]}, ValueError, "`videos` or `audio` was given"),
    ],
)
def test_bad_input_is_named(processor, inputs, error, message):
    with pytest.raises(error, match=message):
        processor(**inputs)


def test_pixel_values_that_are_no_image_are_refused(image):
    image_processor = SiglipImageProcessorPil(size=SQUARE)
    image_processor.preprocess = lambda images, **kwargs: {"pixel_values": [torch.zeros(16, 768)]}
    with pytest.raises(ValueError, match=r"SiglipImageProcessorPil, which makes .*\(16, 768\).*expected \(3, H, W\)"):
        build_processor(image_processor)(images=image, return_tensors="pt")


def test_patches_of_images_that_keep_their_aspect_ratio():
    processor = build_processor(Siglip2ImageProcessorPil(max_num_patches=16, patch_size=8))
    images = [Image.new("RGB", (80, 20)), Image.new("RGB", (40, 40))]
    inputs = processor(images=images, boxes=[[[0, 5, 40, 20]], [[10, 10, 20, 40]]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 16, 192)
    assert inputs["spatial_shapes"].tolist() == [[2, 8], [4, 4]]
    expected = torch.tensor([[[0.0, 0.25, 0.5, 1.0]], [[0.25, 0.25, 0.5, 1.0]]])  # of the whole images
    torch.testing.assert_close(inputs["boxes"], expected)


def test_bad_construction_is_named():
    image_processor = CLIPImageProcessorPil()
    with pytest.raises(ValueError, match="`image_token` is '<image>', which the tokenizer does not know"):
        MMGEMProcessor(image_processor, build_tokenizer(), num_visual_tokens=N)
    with pytest.raises(ValueError, match="no `pad_token`"):
        MMGEMProcessor(image_processor, build_tokenizer(pad_token=None), num_visual_tokens=N, image_token="image")
    for num_visual_tokens in (0, 2.0, None):
        with pytest.raises(ValueError, match=f"`num_visual_tokens` is {num_visual_tokens}; expected a positive"):
            MMGEMProcessor(image_processor, build_tokenizer(), num_visual_tokens, image_token="image")


# Conversations

QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there ?"}]}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}


def test_chat_template_is_the_contents_and_an_end_after_answers(processor):
    assert processor.apply_chat_template([QUESTION]) == "<image>what is there ?"
    assert processor.apply_chat_template([QUESTION, ANSWER]) == "<image>what is there ?a cat<eos>"
    assert (
        processor.apply_chat_template([{"role": "user", "content": "a"}, {**ANSWER, "content": "cat"}]) == "acat<eos>"
    )
    assert processor.apply_chat_template([QUESTION, ANSWER], continue_final_message=True).endswith("a cat")


def test_conversations_become_model_inputs(processor, image):
    question = {**QUESTION, "content": [{"type": "image", "image": image}, QUESTION["content"][1]]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(
        [[question, ANSWER], [question]], return_assistant_tokens_mask=True, **options
    )
    direct = processor(images=[image, image], text=["<image>what is there ?a cat<eos>", "<image>what is there ?"])
    assert inputs.input_ids.tolist() == direct["input_ids"]
    assert inputs.assistant_masks[0].tolist() == [0] * (N + 4) + [1] * 3
    assert inputs.assistant_masks[1].sum() == 0
    assert inputs.pixel_values.shape == (2, 3, 32, 32)

    boxes = {"boxes": [[[8, 0, 56, 48], [20, 9, 30, 30]]]}
    inputs = processor.apply_chat_template([question], processor_kwargs=boxes, **options)
    assert (inputs.input_ids == processor.image_token_id).sum() == 2 * N


def test_placeholders_in_what_a_user_wrote_can_be_read_as_text(processor, image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": "a <image>"}]
    conversation = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(conversation, sanitize_control_tokens=True, **options)
    assert (inputs.input_ids == processor.image_token_id).sum() == N
    boxes = {"boxes": [[[8, 0, 56, 48], [20, 9, 30, 30]]]}
    inputs = processor.apply_chat_template(
        conversation, sanitize_control_tokens=True, processor_kwargs=boxes, **options
    )
    assert (inputs.input_ids == processor.image_token_id).sum() == 2 * N
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
        processor.apply_chat_template(conversation, **options)


# Decoding, towers, saving


def test_decoding_leaves_out_what_is_no_text(processor):
    ids = [[0, 0, processor.image_token_id, 3, 5, 1]]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a cat"]
    assert processor.post_process_image_text_to_text(ids) == ["a cat"]


def test_number_of_tokens_of_images(processor):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (30, 30)])
    assert counts["num_image_tokens"] == [N, N]


def test_from_towers_reads_checkpoints(tmp_path, image):
    IMAGE_PROCESSORS["siglip"].save_pretrained(tmp_path / "vision")
    build_tokenizer(pad_token=None).save_pretrained(tmp_path / "text")
    LlamaConfig(max_position_embeddings=20).save_pretrained(tmp_path / "text")
    processor = MMGEMProcessor.from_towers(
        str(tmp_path / "vision"), tmp_path / "text", num_visual_tokens=N, num_embedding_tokens=3
    )
    assert type(processor.image_processor) is SiglipImageProcessorPil
    assert processor.tokenizer.pad_token == "<eos>"
    assert processor.image_token_id == len(WORDS)
    assert processor.tokenizer.model_max_length == 20 - N - 3
    assert processor(images=image, text="<image> a", return_tensors="pt").pixel_values.shape == (1, 3, 96, 96)


def test_the_longest_text_fits_after_an_image(image):
    """Into a language model of 40 tokens, in every way that one is used; one token more does not."""
    vision, language_model = build_towers()
    language_model.config.max_position_embeddings = 40
    tokenizer = build_tokenizer(model_max_length=40)
    processor = MMGEMProcessor.from_towers(SiglipImageProcessorPil(size=SQUARE), tokenizer, N, num_embedding_tokens=3)
    image_token_id = processor.image_token_id
    settings = {"num_visual_tokens": N, "num_embedding_tokens": 3, "image_token_id": image_token_id}
    model = MMGEMModel.from_towers(vision, language_model, **settings)
    texts = processor(text="a " * 99, images=image, return_tensors="pt")
    length = texts["input_ids"].shape[1]
    assert length == 40 - N - 3
    model(**texts, return_loss=True, fused_index=torch.tensor([0]))  # behind its image, to be written and to be read
    longer = torch.cat([texts["input_ids"], texts["input_ids"][:, :1]], dim=1)
    with pytest.raises(ValueError, match="41 tokens long; the language model takes at most 40"):
        model(longer, texts["pixel_values"], return_loss=True, fused_index=torch.tensor([0]))
    prompt = processor(text="<image>" + "a " * 99, images=image, return_tensors="pt")
    assert prompt["input_ids"].shape[1] == 40 - 3
    with pytest.raises(ValueError, match="`num_visual_tokens` is 39; expected fewer"):
        MMGEMProcessor.from_towers(SiglipImageProcessorPil(), build_tokenizer(model_max_length=40), 39)


def test_token_types_are_left_out(image):
    """Tokenizers make them by default, and causal language models take none."""
    tokenizer = build_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    processor = MMGEMProcessor.from_towers(IMAGE_PROCESSORS["clip"], tokenizer, num_visual_tokens=N)
    assert set(processor(text="a")) == set(processor.tokenizer("a")) == {"input_ids", "attention_mask"}


FRESH_PROCESS = """
import json, sys
from PIL import Image
from transformers import AutoProcessor
folder, again = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
processor.save_pretrained(again)
processor = AutoProcessor.from_pretrained(again, trust_remote_code=True)
image = Image.new("RGB", (64, 48), "red")
inputs = processor(images=image, text="<image> a", boxes=[[[9, 9, 30, 30]]], return_tensors="pt")
print(json.dumps({name: value.tolist() for name, value in inputs.items()}))
"""


def save(processor, folder):
    processor.tokenizer.padding_side = "left"
    processor.save_pretrained(folder)
    inputs = processor(
        images=Image.new("RGB", (64, 48), "red"), text="<image> a", boxes=[[[9, 9, 30, 30]]], return_tensors="pt"
    )
    return {name: value.tolist() for name, value in inputs.items()}


def test_round_trip(tmp_path):
    processor = build_processor(model_max_length=99)
    expected = save(processor, tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "MMGEMProcessor"  # the folder's code, or what a test before this one registered
    assert loaded.tokenizer.padding_side == "left"
    assert loaded.tokenizer.model_max_length == 98 - N
    assert (loaded.num_visual_tokens, loaded.image_token_id) == (N, processor.image_token_id)
    assert loaded.chat_template == processor.chat_template
    code = {
        "boxes",
        "image_loading",
        "processing_mmgem",
        "sentence_transformers_inputs",
        "sentence_transformers_mmgem",
        "token_batches",
        "url_fetching",
    }
    assert {path.stem for path in tmp_path.glob("*.py")} == code
    assert save(loaded, tmp_path / "again") == expected


@pytest.mark.slow
def test_round_trip_in_a_fresh_process_without_the_package(processor, tmp_path):
    expected = save(processor, tmp_path / "saved")
    arguments = (tmp_path / "saved", tmp_path / "again")
    output = fresh_process.run(FRESH_PROCESS, *arguments, cwd=tmp_path, installed=False)
    assert json.loads(output.splitlines()[-1]) == expected
