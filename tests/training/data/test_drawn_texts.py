"""Texts that are embedded with images, find boxes by instructions, and are written from the memory of images."""

import pytest
import torch
from PIL import Image
from tiny_models import build_model
from transformers import CLIPImageProcessorPil

from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.data.drawn_texts import TextDrawing
from mmgem.training.data.mixture import Mixture
from mmgem.training.data.open_source import open_source
from mmgem.training.trainer.grad_cache import split_batch

PROMPTS = {"edit": "change it: ", "object": "where is "}
NOTHING = {"captions_per_image": 0, "regions_per_image": 0, "questions_per_image": 0, "long_caption_probability": 0.0}
EVERYTHING = {
    "edits_per_image": 1,
    "instructed_regions_per_image": 2,
    "memory_captions_per_image": 1,
    "memory_questions_per_image": 1,
    "match_captions_per_image": 1,
}
BOXES = [[0, 0, 16, 16], [16, 16, 32, 32], [16, 0, 32, 16]]


def picture(color):
    return Image.new("RGB", (32, 32), color)


def row(name, **columns):
    return {"image": picture("navy"), "captions": [f"caption of {name}"], "image_id": name} | columns


def edited(name, color="red"):
    return row(name, edit={"instruction": f"paint {name} {color}"}, edited_image=picture(color))


def boxed(name):
    captions = [f"region {box} of {name}" for box in range(3)]
    instructions = [{"text": f"box {box} of {name}", "box": box} for box in (2, 0)]
    return row(name, boxes=BOXES, region_captions=captions, instructions=instructions)


def texts_of(batch, processor):
    return [
        processor.tokenizer.decode(ids[mask.bool()]).strip()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def written_of(batch, processor):
    return [processor.tokenizer.decode(labels[labels != -100]).strip() for labels in batch["labels"]]


def scene_rows(count, **arguments):
    source = open_source({"scenes": {"seed": 3, "count": 100, "image_size": 48, **arguments}})
    mixture = Mixture([source], None, seed=0, num_samples=100)
    return [mixture[position] for position in range(count)]


def test_an_edit_finds_the_edited_image_by_the_image(tiny_processor):
    rows = [edited("a"), row("b"), edited("c", "white")]
    batch, row_of_text = MMGEMCollator(tiny_processor, edits_per_image=1, prompts=PROMPTS).collate(rows)
    assert row_of_text == [0, 0, 1, 2, 2]
    assert texts_of(batch, tiny_processor) == [
        *("caption of a", "change it: paint a red", "caption of b"),
        *("caption of c", "change it: paint c white"),
    ]
    assert batch["image_index"].tolist() == [0, 1, 2, 3, 4]  # each edited image follows its row's own
    assert batch["fused_index"].tolist() == [[-1], [0], [-1], [-1], [3]]
    assert batch["contrastive_mask"].all() and (batch["box_index"] == -1).all()
    assert written_of(batch, tiny_processor)[1::3] == ["", ""]
    colors = tiny_processor(images=[picture(color) for color in ("red", "white")], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"][[1, 4]], colors["pixel_values"])
    ids = batch["image_ids"].tolist()
    assert len(set(ids)) == 5
    plain = MMGEMCollator(tiny_processor)(rows)
    assert plain["image_ids"].tolist() == [ids[0], ids[2], ids[3]] and len(plain["pixel_values"]) == 3


def test_an_edit_stands_after_all_images_of_its_row(tiny_processor):
    several = {"images": [picture("red"), picture("blue")], "edit": {"instruction": "mix them"}}
    rows = [row("a"), several | {"edited_image": picture("purple"), "image_id": "b"}, edited("c")]
    batch = MMGEMCollator(tiny_processor, edits_per_image=1)(rows)
    assert texts_of(batch, tiny_processor) == ["caption of a", "mix them", "caption of c", "paint c red"]
    assert batch["image_index"].tolist() == [0, 3, 4, 5]
    assert batch["fused_index"].tolist() == [[-1, -1], [1, 2], [-1, -1], [4, -1]]
    model = build_model().eval()
    found = model(**batch, return_contrastive_batch=True).contrastive_batch
    n, image_token = model.config.num_visual_tokens, model.config.image_token_id
    text = torch.tensor([[image_token] * 2 * n + batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist()])
    alone = model.get_multimodal_features(text, pixel_values=batch["pixel_values"][1:3]).pooler_output
    torch.testing.assert_close(found.query_embeds[1], torch.nn.functional.normalize(alone[0], dim=-1))
    assert found.target_index.tolist() == [0, 3, 4, 5]


def test_the_prompt_of_a_row_stands_before_what_is_embedded(tiny_processor):
    prompts = PROMPTS | {"query": "find: "}
    options = {"hard_negatives_per_image": 1, "label_template": "a {label}", "long_caption_probability": 1.0}
    columns = {"label": "star", "long_caption": "a long text", "hard_negatives": ["not it"], "prompt_name": "query"}
    rows = [boxed("a") | columns, row("b"), {"text": "words", "prompt_name": "query"}]
    collator = MMGEMCollator(tiny_processor, prompts=prompts, regions_per_image=1, **options)
    batch = collator(rows)
    texts, written = texts_of(batch, tiny_processor), written_of(batch, tiny_processor)
    is_embedded = batch["contrastive_mask"].tolist()
    region = texts[5]
    assert region.startswith("region ") and [text for text, used in zip(texts, is_embedded, strict=True) if used] == [
        *("find: caption of a", "find: a long text", "find: a star"),
        *(f"find: {region}", "find: not it", "caption of b"),
    ]
    # What is written, and what is written of nothing, has no prompt.
    assert [text for text in written if text] == ["caption of a", region, "caption of b", "words"]
    plain = collator([one | {"prompt_name": None} for one in rows])
    assert len(plain["input_ids"]) == len(batch["input_ids"]) - 2
    with pytest.raises(ValueError, match="`prompt_name` of row 'x:1' is 'ask'; expected one of edit, object, query"):
        collator([row("a", prompt_name="ask", row_key="x:1")])


@pytest.mark.parametrize("prompt_name", [None, "query"])
def test_the_caption_of_a_box_is_embedded_alone_and_written_after_its_prompt(tiny_processor, prompt_name):
    prompts = {"query": "find: ", "region_caption": "what is here?"}
    collator = MMGEMCollator(tiny_processor, prompts=prompts, regions_per_image=1)
    batch = collator([boxed("a") | {"prompt_name": prompt_name}])
    texts, written = texts_of(batch, tiny_processor), written_of(batch, tiny_processor)
    caption, *_, embedded, asked = texts
    region = written[-1]
    assert region.startswith("region ") and asked == f"what is here? {region}" and "caption of a" in written
    assert embedded == ("find: " if prompt_name else "") + region and written[-2] == ""
    assert batch["contrastive_mask"].tolist()[-2:] == [True, False] and batch["box_index"].tolist()[-2:] == [0, 0]
    # The prompt is tokenized as those who generate tokenize it.
    prompt = batch["input_ids"][-1][(batch["labels"][-1] == -100) & batch["attention_mask"][-1].bool()].tolist()
    ids = tiny_processor.prompt_ids("what is here?")
    assert [token for token in ids if token != tiny_processor.image_token_id] == prompt


def test_an_edit_without_its_image_is_left_alone(tiny_processor):
    rows = [row("a", edit={"instruction": "paint it red"}), row("b", edit={"instruction": None, "file_name": None})]
    batch = MMGEMCollator(tiny_processor, edits_per_image=1)(rows)
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 2
    assert batch["fused_index"].tolist() == [[-1], [-1]]


def test_edited_images_beside_boxes_have_none(tiny_processor):
    rows = [boxed("a") | edited("a"), boxed("b")]
    batch = MMGEMCollator(tiny_processor, regions_per_image=1, edits_per_image=1)(rows)
    assert (batch["boxes"] != 0).any(-1).sum(-1).tolist() == [1, 0, 1]
    assert batch["image_index"].tolist() == [0, 0, 1, 2, 2]


def test_an_instruction_finds_the_box_it_names(tiny_processor):
    collator = MMGEMCollator(
        tiny_processor, captions_per_image=0, regions_per_image=1, instructed_regions_per_image=1, prompts=PROMPTS
    )
    box_counts = set()
    for seed in range(8):
        batch = collator([row("x"), boxed("a") | {"draw_seed": seed}])
        region, instruction = texts_of(batch, tiny_processor)
        for text, found in zip((region, instruction), batch["box_index"].tolist(), strict=True):
            box = int(text.removeprefix("where is box ").removeprefix("region ")[0])
            torch.testing.assert_close(batch["boxes"][1, found] * 32, torch.tensor(BOXES[box], dtype=torch.float32))
        assert instruction in ("where is box 0 of a", "where is box 2 of a")
        assert batch["image_index"].tolist() == [1, 1] and batch["fused_index"].tolist() == [[-1], [1]]
        assert batch["contrastive_mask"].all() and written_of(batch, tiny_processor) == [region, ""]
        boxes = [tuple(box) for box in batch["boxes"][1].tolist() if any(box)]
        assert len(set(boxes)) == len(boxes)
        box_counts.add(len(boxes))
    assert box_counts == {2, 3}  # one to find, one that may be another, and one that is


def test_there_is_another_box_beside_the_one_to_find_where_the_image_has_one(tiny_processor):
    collator = MMGEMCollator(tiny_processor, **(NOTHING | {"instructed_regions_per_image": 1}))
    alone = row("b", boxes=BOXES[:1], region_captions=["it"], instructions=[{"text": "it", "box": 0}])
    batch = collator([boxed("a"), alone])
    assert (batch["boxes"] != 0).any(-1).sum(-1).tolist() == [2, 1]
    assert batch["box_index"].tolist() == [0, 0]


def test_no_instruction_names_what_is_cropped_away(tiny_processor):
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True
    )
    processor = MMGEMProcessor(image_processor, tiny_processor.tokenizer, num_visual_tokens=4)
    instructions = [{"text": "the outer", "box": 0}, {"text": "the inner", "box": 1}]
    columns = {"boxes": [[0, 0, 16, 16], [20, 0, 40, 16]], "region_captions": ["x", "y"], "instructions": instructions}
    wide = row("a", **columns) | {"image": Image.new("RGB", (64, 32))}
    batch = MMGEMCollator(processor, **(NOTHING | {"instructed_regions_per_image": 2}))([wide])
    assert texts_of(batch, processor) == ["the inner"]
    assert batch["boxes"].shape == (1, 1, 4)


def test_captions_and_answers_are_written_from_one_memory(tiny_processor):
    turns = [{"question": f"number {i}?", "answer": f"it is {i}"} for i in range(3)]
    options = NOTHING | {"memory_captions_per_image": 1, "memory_questions_per_image": 2}
    batch = MMGEMCollator(tiny_processor, **options)([row("a", qa=turns[:1]), row("b", qa=turns), {"text": "alone"}])
    texts, written = texts_of(batch, tiny_processor), written_of(batch, tiny_processor)
    assert texts[:4] == ["", "caption of a", "number 0? it is 0", ""] and len(texts) == 7
    assert written[:3] == ["", "caption of a", "it is 0"] and written[6] == "it is " + texts[6][-1]
    assert batch["memory_row"].tolist() == [-1, 0, 0, -1, 3, 3, 3]
    assert batch["image_index"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch["fused_index"][:, 0].tolist() == [0, -1, -1, 1, -1, -1, -1]
    assert not batch["contrastive_mask"].any() and "target_row" not in batch


def test_a_caption_finds_its_image_as_the_language_model_embeds_it(tiny_processor):
    options = NOTHING | {"match_captions_per_image": 2, "memory_captions_per_image": 1}
    rows = [row("a", captions=["one", "two", "three"]), row("b")]
    batch = MMGEMCollator(tiny_processor, **options)(rows)
    assert batch["target_row"].tolist() == [-1, -1, 0, 0, -1, -1, 4]
    assert batch["memory_row"].tolist() == [-1, 0, -1, -1, -1, 4, -1]
    assert batch["contrastive_mask"].tolist() == [False, False, True, True, False, False, True]
    assert batch["fused_index"][:, 0].tolist() == [0, -1, -1, -1, 1, -1, -1]
    texts, written = texts_of(batch, tiny_processor), written_of(batch, tiny_processor)
    assert texts[4:] == ["", "caption of b", "caption of b"] and written[4:] == ["", "caption of b", ""]
    assert set(texts[2:4]) < {"one", "two", "three"}


def test_each_image_of_a_sample_has_a_memory_of_its_own(tiny_processor):
    several = {"images": [picture("red"), picture("blue")], "captions": [f"text {i}" for i in range(20)]}
    options = NOTHING | {"memory_captions_per_image": 20, "match_captions_per_image": 20}
    batch = MMGEMCollator(tiny_processor, **options)([row("a"), several | {"image_id": "b"}])
    fused_index = batch["fused_index"][:, 0]
    sources = (fused_index >= 0).nonzero()[:, 0]
    assert fused_index[sources].tolist() in ([0, 1, 2], [0, 2, 1])
    for name in ("memory_row", "target_row"):
        pointing = batch[name] >= 0
        assert pointing.sum() == 21
        assert torch.equal(fused_index[batch[name][pointing]], batch["image_index"][pointing])


@pytest.mark.parametrize(
    ("option", "keys"),
    [
        ("hard_negatives_per_image", {"hard_negative_mask"}),
        ("edits_per_image", {"fused_index"}),
        ("instructed_regions_per_image", {"fused_index"}),
        ("memory_captions_per_image", {"fused_index", "memory_row"}),
        ("memory_questions_per_image", {"fused_index", "memory_row"}),
        ("match_captions_per_image", {"fused_index", "target_row"}),
    ],
)
def test_what_a_batch_has_follows_from_the_options_alone(tiny_processor, option, keys):
    collator = MMGEMCollator(tiny_processor, **{option: 1})
    for rows in ([edited("a") | boxed("a")], [{"text": "alone"}]):
        assert collator(rows).keys() & {"fused_index", "target_row", "memory_row", "hard_negative_mask"} == keys


def test_what_is_drawn_first_does_not_depend_on_what_is_drawn_after_it(tiny_processor):
    rows = scene_rows(4)
    plain = MMGEMCollator(tiny_processor)(rows)
    rich = MMGEMCollator(tiny_processor, **EVERYTHING)(rows)
    is_new = (rich["fused_index"][:, 0] >= 0) | (rich["target_row"] >= 0) | (rich["memory_row"] >= 0)
    expected = texts_of(plain, tiny_processor)
    assert [text for text, new in zip(texts_of(rich, tiny_processor), is_new, strict=True) if not new] == expected
    assert is_new.sum() > 5 * len(rows)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_of_a_batch_are_whole(tiny_processor, chunk_size):
    """What `split_batch` needs: the images of a row are neighbors, and its texts know which of them they go with."""
    batch = MMGEMCollator(tiny_processor, **EVERYTHING)(scene_rows(4))
    del batch["row_keys"]
    chunks = split_batch(batch, chunk_size)
    assert sum(len(chunk["input_ids"]) for chunk in chunks) == len(batch["input_ids"])
    assert sum(map(len, (chunk["pixel_values"] for chunk in chunks if "pixel_values" in chunk))) > 4
    model = build_model().eval()
    whole = model(**batch, return_contrastive_batch=True).contrastive_batch
    parts = [model(**chunk, return_contrastive_batch=True).contrastive_batch for chunk in chunks]
    for name in ("query_embeds", "query_ids", "query_modality"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name])
    scores = [part.query_embeds @ part.target_embeds[part.target_index].T for part in parts]
    torch.testing.assert_close(
        torch.cat([score.diagonal() for score in scores]),
        (whole.query_embeds * whole.target_embeds[whole.target_index]).sum(-1),
    )


def test_scenes_train_the_model_from_every_column(tiny_processor):
    batch = MMGEMCollator(tiny_processor, prompts=PROMPTS, **EVERYTHING)(scene_rows(6))
    batch.pop("row_keys")
    texts = texts_of(batch, tiny_processor)
    assert sum(text.startswith("change it: ") for text in texts) == len(batch["pixel_values"]) - 6 > 0
    assert sum(text.startswith("where is the ") for text in texts) >= 6
    model = build_model(num_embedding_tokens=3, embedding_pooling="mean")
    outputs = model(**batch)
    assert outputs.loss.isfinite() and outputs.contrastive_loss > 0 and outputs.caption_loss > 0


def test_the_compress_stage_sees_images_through_the_embedding_tokens_alone(tiny_processor):
    options = NOTHING | {"memory_captions_per_image": 1, "memory_questions_per_image": 1}
    batch = MMGEMCollator(tiny_processor, **options)(scene_rows(3))
    batch.pop("row_keys")
    model = build_model(num_embedding_tokens=2, embedding_pooling="mean")
    loss = model(**batch).caption_loss
    loss.backward()
    assert model.embedding_tokens.grad.norm() > 0
    changed = batch | {"pixel_values": batch["pixel_values"].flip(0)}
    assert not torch.isclose(model(**changed).caption_loss, loss)
    read = (batch["memory_row"] < 0) & (batch["labels"] != -100).any(-1)
    assert not read.any()  # nothing is written from the image itself


@pytest.mark.parametrize("name", [*NOTHING, *EVERYTHING, "hard_negatives_per_image"])
def test_numbers_below_0_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is -1; expected"):
        TextDrawing(**{name: -1})


def test_a_probability_above_1_is_refused():
    with pytest.raises(ValueError, match="`long_caption_probability` is 1.5; expected a number from 0 to 1"):
        TextDrawing(long_caption_probability=1.5)
