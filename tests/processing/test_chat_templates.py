"""Instruct models keep their chat template: prompts are its turns, and training writes what generation continues."""

import pytest
import torch
from PIL import Image
from tiny_models import build_model
from transformers import CLIPImageProcessorPil
from vlms import IMAGE, build_tokenizer, build_vlm, build_vlm_processor

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.training.data.collator import MMGEMCollator
from mmgem.training.inference import answer_from_memory, embed_fused, generate_answers, generate_region_captions

# Small ones of the forms of SmolLM2, Qwen 3 and Gemma; the middle one thinks unless told not to.
SMOLLM2 = (
    "{% for message in messages %}{{ '<start>' + message['role'] + '\n' + message['content'] + '<eos>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
QWEN = (
    "{%- for message in messages %}{%- set content = message.content if message.content is string else '' %}"
    "{{- '<start>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- content.strip() + '<eos>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start>' + role + '\n' + message['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
TEMPLATES = {"smollm2": SMOLLM2, "qwen": QWEN, "gemma": GEMMA}
N = 4


def build_processor(template: str | None) -> MMGEMProcessor:
    tokenizer = build_tokenizer(chat_template=TEMPLATES.get(template))
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return MMGEMProcessor.from_towers(image_processor, tokenizer, num_visual_tokens=N)


def tokens(processor: MMGEMProcessor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def image() -> Image.Image:
    torch.manual_seed(0)
    return Image.effect_noise((64, 48), 80).convert("RGB")


@pytest.fixture
def model() -> MMGEMModel:
    model = build_model(image_token_id=IMAGE)
    model.config.text_config.eos_token_id = 0
    return model


ROWS = [
    {
        "captions": ["a red star"],
        "qa": [{"question": "what color?", "answer": "red"}],
        "boxes": [[2, 2, 30, 30]],
        "region_captions": ["a star"],
        "edit": {"instruction": "make it blue"},
        "image_id": "0",
    }
]
OPTIONS = {"long_caption_probability": 0.0, "edits_per_image": 1, "memory_captions_per_image": 1}


def collate(processor: MMGEMProcessor, image: Image.Image) -> dict:
    torch.manual_seed(0)
    row = {**ROWS[0], "image": image, "edited_image": image, "edited_image_id": "1"}
    return MMGEMCollator(processor, **OPTIONS)([row])


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_trained_begins_the_conversation_in_the_template(template, image):
    processor = build_processor(template)
    batch = collate(processor, image)
    whole = {
        (question, answer): tokens(
            processor,
            processor.tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": "<image>" + question},
                    {"role": "assistant", "content": answer},
                ],
                tokenize=False,
            ),
        )
        for question, answer in (("", "a red star"), ("what color?", "red"), ("", "a star"))
    }
    seen = set()
    for row in range(len(batch["input_ids"])):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        learned = [int(label) for label in batch["labels"][row] if label != -100]
        if learned:
            (found,) = (key for key, conversation in whole.items() if conversation[: len(ids)] == ids)
            assert processor.tokenizer.decode(learned).startswith(found[1])  # the answer,
            assert learned[-1] in tokens(processor, "<eos><end>")  # and the end of its turn
            prompt = processor(images=[image], text=[processor.prompt(found[0])], **processor.prompt_kwargs)
            expanded = [token for token in ids[: len(ids) - len(learned)] for _ in range(N if token == IMAGE else 1)]
            assert prompt["input_ids"][0] == expanded  # what generation sees
            seen.add(found)
    assert seen == set(whole)


@pytest.mark.parametrize("template", TEMPLATES)
def test_texts_are_embedded_alone_and_as_they_are(template, image):
    processor = build_processor(template)
    batch = collate(processor, image)
    rows = [
        processor.tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row].bool()])
        for row in range(len(batch["input_ids"]))
        if batch["contrastive_mask"][row]
    ]
    assert rows[:2] == ["a red star", "a star"]
    assert rows[2] == processor.prompt("make it blue")
    assert (batch["labels"][batch["contrastive_mask"]] == -100).all()


def test_a_base_model_has_plain_prompts(image):
    processor = build_processor(None)
    assert processor.is_plain and processor.prompt_kwargs == {}
    assert processor.prompt("what?", 2) == "<image><image>what?"
    batch = collate(processor, image)
    assert not (batch["input_ids"] == IMAGE).any()
    both = batch["contrastive_mask"] & (batch["labels"] != -100).any(-1)
    assert both.sum() == 2  # captions are embedded and written as one text


@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_joint_step_learns_what_the_prompt_scores(template, image, model):
    processor = build_processor(template)
    torch.manual_seed(0)
    row = {"captions": ["a red star"], "image": image}
    batch = MMGEMCollator(processor, questions_per_image=0)([row])
    loss = model(**batch).caption_loss
    prompt = processor(images=[image], text=[processor.prompt()], return_tensors="pt", **processor.prompt_kwargs)
    answer = processor.answer_ids("a red star")
    answer = torch.tensor([answer if answer[-1] == 0 else [*answer, 0]])
    ids = torch.cat([prompt["input_ids"], answer], dim=1)
    labels = torch.nn.functional.pad(answer, (prompt["input_ids"].shape[1], 0), value=-100)
    expected = model(input_ids=ids, pixel_values=prompt["pixel_values"], labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("template", [*TEMPLATES, None])
@torch.no_grad()
def test_every_way_to_generate_and_embed_takes_the_prompt(template, image, model):
    processor = build_processor(template)
    prompt = processor(
        images=[image], text=[processor.prompt("what?")], return_tensors="pt", **processor.prompt_kwargs
    )
    length = prompt["input_ids"].shape[1]
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, length:]
    expected = processor.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert generate_answers(model, processor, [image], ["what?"], max_new_tokens=4) == [expected]
    fused = torch.nn.functional.normalize(model.get_multimodal_features(**prompt).pooler_output, dim=-1)
    torch.testing.assert_close(embed_fused(model, processor, [image], ["what?"]), fused)
    whole = [[0, 0, 64, 48]]
    assert len(generate_region_captions(model, processor, [image], [whole], max_new_tokens=4)) == 1
    # Visual tokens in the place of a memory are read as in that of an image.
    memory = model.token_projection(model.get_image_features(prompt["pixel_values"]).last_hidden_state)
    model.embedding_tokens = torch.nn.Parameter(torch.zeros(N, memory.shape[-1]))
    assert answer_from_memory(model, processor, memory, ["what?"], max_new_tokens=4) == [expected]


def test_a_conversation_with_images_goes_through_the_template(image):
    processor = build_processor("gemma")
    turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}
    assert processor.apply_chat_template([turn]) == "<bos><start>user\n<image>what?<end>\n"
    inputs = processor.apply_chat_template([turn], tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs["input_ids"] == IMAGE).sum() == N and (inputs["input_ids"] == 2).sum() == 1
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)


def test_saved_and_loaded(tmp_path):
    processor = build_processor("qwen")
    processor.save_pretrained(tmp_path)
    loaded = MMGEMProcessor.from_pretrained(tmp_path)
    assert loaded.prompt("what?") == processor.prompt("what?") != "<image>what?"
    assert loaded.answer_ids("red", "what?") == processor.answer_ids("red", "what?")


def test_a_template_that_does_not_go_on_from_its_prompt_is_refused():
    processor = build_processor(None)
    processor.chat_template = "{% if add_generation_prompt %}ask{% else %}told{% endif %}"
    with pytest.raises(ValueError, match="begins with its prompt"):
        processor.answer_ids("red")


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "paligemma"])
def test_a_vlm_is_trained_to_answer_its_own_prompts(family, image):
    own = build_vlm_processor(family)
    processor = MMGEMProcessor.from_vlm(own, num_visual_tokens=N)
    model = MMGEMModel.from_vlm(build_vlm(family), processor=own, projection_dim=16, num_visual_tokens=N)
    options = {"images_kwargs": {"do_image_splitting": False}} if family == "idefics3" else {}
    prompt = processor(
        images=[image], text=[processor.prompt("what?")], return_tensors="pt", **processor.prompt_kwargs, **options
    )
    ids = [token for token in prompt["input_ids"][0].tolist() if token != IMAGE]
    assert [token for token in processor.prompt_ids("what?") if token != IMAGE] == ids
    assert processor.prompt_ids("what?").count(IMAGE) == 1
    torch.manual_seed(0)
    row = {**ROWS[0], "image": image, "edited_image": image, "edited_image_id": "1"}
    batch = MMGEMCollator(processor, **OPTIONS)([row])
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert generate_answers(model, processor, [image], ["what?"], max_new_tokens=2) is not None
    assert generate_region_captions(model, processor, [image], [[[0, 0, 20, 20]]], max_new_tokens=2) is not None
    memory = model.get_multimodal_features(**prompt).last_hidden_state.detach()
    assert answer_from_memory(model, processor, memory, ["what?"], max_new_tokens=2) is not None
