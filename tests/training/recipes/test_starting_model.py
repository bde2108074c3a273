import copy

import pytest
import torch
from gguf_files import write_gguf
from PIL import Image
from tiny_models import build_model as tiny_model
from tiny_models import build_towers
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, SiglipImageProcessorPil
from vlms import build_vlm, build_vlm_processor

from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.open_source import load_rows
from mmgem.training.recipes.recipe import ModelSection, Recipe, Stage, parse_recipe
from mmgem.training.recipes.starting_model import build_model, prepare_for_stage, set_image_size
from mmgem.training.recipes.validation import check_sections, check_stages

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EMBEDDING = {"num_embedding_tokens": 16, "embedding_pooling": "multi_vector"}


def stage_with(**sections):
    return Stage(name="first", train_data=[], training={}, **sections)


@pytest.fixture
def checkpoint(tiny_processor, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("image_processor", "size", "crop"),
    [
        (SiglipImageProcessorPil(size={"height": 32, "width": 32}), {"height": 48, "width": 48}, None),
        (CLIPImageProcessorPil(), {"shortest_edge": 48}, {"height": 48, "width": 48}),
        (CLIPImageProcessorPil(size={"shortest_edge": 256}), {"shortest_edge": 55}, {"height": 48, "width": 48}),
        (
            CLIPImageProcessorPil(size={"height": 9, "width": 9}, do_center_crop=False),
            {"height": 48, "width": 48},
            None,
        ),
    ],
)
def test_image_processors_of_each_kind_change_their_size_for_good(image_processor, size, crop, tmp_path):
    image_processor = copy.deepcopy(image_processor)
    set_image_size(image_processor, 48)
    image_processor.save_pretrained(tmp_path)
    for changed in (image_processor, type(image_processor).from_pretrained(tmp_path)):
        assert {key: value for key, value in dict(changed.size).items() if value} == size
        if crop is not None:
            assert {key: value for key, value in dict(changed.crop_size).items() if value} == crop
        pixels = changed([Image.new("RGB", (90, 60))], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 48, 48)


def test_a_stage_changes_what_it_names_and_nothing_else(tiny_processor):
    recipe = Recipe(model=ModelSection(dtype="bfloat16", attn_implementation="eager"), stages=[])
    model, processor = tiny_model(), copy.deepcopy(tiny_processor)
    before = processor.image_processor.to_dict()
    prepare_for_stage(model, processor, recipe, stage_with())
    assert model.dtype == torch.bfloat16 and model.config.text_attention == "causal"
    assert model.language_model.config._attn_implementation == "eager"
    assert processor.image_processor.to_dict() == before
    second = stage_with(image_size=40, text_attention="bidirectional")
    prepare_for_stage(model, processor, Recipe(model=ModelSection(), stages=[]), second)
    assert model.config.text_attention == "bidirectional"
    pixels = processor(images=[Image.new("RGB", (50, 30))], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 40, 40)
    assert model.get_image_features(pixels).last_hidden_state.shape[1] == 4  # positions are interpolated


def test_a_stage_sets_prompts_and_embedding_tokens_and_leaves_room_for_them(tiny_processor):
    model, processor = tiny_model(), copy.deepcopy(tiny_processor)
    before = model.embedding_tokens.detach().clone()
    processor.tokenizer.model_max_length = 250
    recipe = Recipe(model=ModelSection(attn_implementation="eager"), prompts={"query": "Find "}, stages=[])
    stage = stage_with(text_attention="bidirectional", embedding=EMBEDDING)
    prepare_for_stage(model, processor, recipe, stage)
    assert model.config.prompts == {"query": "Find "} and model.config.text_attention == "bidirectional"
    assert model.embedding_tokens.shape[0] == model.config.num_embedding_tokens == 16
    torch.testing.assert_close(model.embedding_tokens[:1], before)
    assert model.config._attn_implementation == model.language_model.config._attn_implementation == "eager"
    inputs = processor(text="star " * 400, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 256 - 4 - 16  # an image fits as well
    assert model.get_text_features(**inputs).pooler_output.shape == (1, 16, 16)


def test_texts_of_a_fresh_tokenizer_leave_room_too(tiny_processor):
    model, processor = tiny_model(), copy.deepcopy(tiny_processor)
    processor.tokenizer.model_max_length = 10_000
    processor(text="star", max_length=5)  # of which nothing may stay
    prepare_for_stage(model, processor, Recipe(model=ModelSection(), stages=[]), stage_with())
    assert processor(text="star " * 400, return_tensors="pt")["input_ids"].shape == (1, 256 - 4 - 1)


def test_the_tokenizer_learns_every_text_that_a_row_may_bring():
    rows = [
        {
            "captions": ["aaaa"],
            "long_caption": "bbbb",
            "region_captions": ["cccc"],
            "qa": [{"question": "dddd", "answer": "eeee"}],
            "hard_negatives": ["ffff"],
            "instructions": [{"text": "gggg", "box": 0}],
            "edit": {"instruction": "hhhh", "file_name": "zzzz"},
            "label": "iiii",
        },
        {"captions": ["aaaa"], "edit": None},
    ]

    class Rows(list):
        texts = list.__getitem__

    model = ModelSection(
        vision_config={"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8} | TOWER,
        text_config={"model_type": "llama"} | TOWER,
        config={"projection_dim": 8, "num_visual_tokens": 4},
    )
    recipe = Recipe(model=model, tokenizer={"vocab_size": 400, "model_max_length": 16}, stages=[])
    _, processor = build_model(recipe, Rows(rows))
    words = processor.tokenizer.get_vocab()
    assert all(f"Ġ{letter * 4}" in words for letter in "abcdefghi")
    assert not any("zz" in word for word in words)


def test_a_recipe_changes_the_image_processor_of_a_checkpoint(checkpoint):
    changes = {"image_mean": [0.1, 0.2, 0.3]}
    recipe = Recipe(model=ModelSection(pretrained=checkpoint), image_processor=changes, stages=[])
    model, processor = build_model(recipe)
    assert tuple(processor.image_processor.image_mean) == (0.1, 0.2, 0.3)
    assert processor.image_processor.size.height == 32 and model.device.type == "cpu"


def test_a_recipe_starts_from_a_vlm(tmp_path):
    build_vlm("llava").save_pretrained(tmp_path)
    build_vlm_processor("llava").save_pretrained(tmp_path)
    compress = {
        "name": "compress",
        "embedding": {"num_embedding_tokens": 4, "embedding_pooling": "mean"},
        "train_data": {"scenes": {"seed": 5, "count": 4, "columns": ["image", "captions", "qa"]}},
        "collator": {"captions_per_image": 1, "memory_captions_per_image": 1, "memory_questions_per_image": 1},
        "training": {"freeze": ["vision_tower"], "learning_rates": {"connector": 1e-5}},
    }
    model = {"vlm": str(tmp_path), "projection_dim": 16, "num_visual_tokens": 4}
    recipe = parse_recipe({"model": model, "stages": [compress]})
    check_sections(recipe)
    check_stages(recipe)
    model, processor = build_model(recipe)
    (stage,) = recipe.stages
    prepare_for_stage(model, processor, recipe, stage)
    rows = [dict(row) for row in load_rows(stage.train_data[0])]
    batch = MMGEMCollator(processor, **stage.collator)(rows)
    model(**batch).loss.backward()
    assert model.embedding_tokens.grad.any() and next(model.connector.parameters()).grad.any()
    with pytest.raises(ValueError, match="`image_size` is 48, but a model that began as a VLM"):
        prepare_for_stage(model, processor, recipe, stage_with(image_size=48))
    with pytest.raises(ValueError, match="`model` has the unknown key `vlm_attention`"):
        check_sections(parse_recipe({"model": {"vlm": str(tmp_path), "vlm_attention": "image"}, "stages": [compress]}))


def test_a_recipe_starts_from_a_language_model_in_gguf(tmp_path):
    vision, _ = build_towers()
    vision.save_pretrained(tmp_path / "vision")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vision")
    write_gguf(tmp_path / "tiny.gguf")
    model = {"vision": str(tmp_path / "vision"), "text": str(tmp_path), "gguf_file": "tiny.gguf"}
    model |= {"projection_dim": 16, "num_visual_tokens": 4}
    stage = {"name": "align", "train_data": {"scenes": {"seed": 5, "count": 2}}, "training": {}}
    recipe = parse_recipe({"model": model, "stages": [stage]})
    check_sections(recipe)
    check_stages(recipe)
    model, processor = build_model(recipe)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    inputs = processor(text="a star", return_tensors="pt")
    expected = stock.eval()(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits[..., : expected.shape[-1]], expected)
    batch = processor(images=[Image.new("RGB", (32, 32))], text=["a star"], return_tensors="pt")
    assert model(**batch, return_loss=True).loss.isfinite()
    tower = {"vision": "vision", "text": "text"}
    for section, message in (
        (tower | {"gguf_file": 3}, "`gguf_file` in `model` is 3; expected str"),
        (tower | {"gguf_fiel": "a"}, "`model` has the unknown key `gguf_fiel`.*Did you mean `gguf_file`"),
        ({"vlm": "vlm", "gguf_file": "a"}, "`model` has the unknown key `gguf_file`"),
        ({"vlm": "vlm", "vision": "a"}, "`model` has the unknown key `vision`"),
    ):
        with pytest.raises(ValueError, match=message):
            check_sections(parse_recipe({"model": section, "stages": [stage]}))
