"""The joint step where images go with texts: fused queries, documents, and what is written from memory."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from joint_batches import ANSWER_STARTS, BOXES, EOS, IMAGE_TOKEN, ROWS, TEXTS, K, N
from joint_batches import joint_batch as batch
from joint_batches import joint_model as tiny

from mmgem.contrastive import ContrastiveObjective
from mmgem.contrastive_batch import DOCUMENT, IMAGE, REGION
from mmgem.joint_step import JointStep
from mmgem.text_rows import IGNORED_LABEL, TextRows
from mmgem.text_sequences import caption_sequences, embedded_sequences


def run(model, **changes):
    return model(**batch(**changes), return_contrastive_batch=True)


def embed(model, text, image=None):
    ids = torch.tensor([[IMAGE_TOKEN] * (N if image is not None else 0) + text])
    pixel_values = None if image is None else batch()["pixel_values"][[image]]
    return model.get_multimodal_features(ids, None, pixel_values)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "multi_vector"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_queries_and_targets_are_what_the_model_embeds(side, pooling, attention):
    model = tiny(embedding_pooling=pooling, text_attention=attention)
    found = run(model, side=side).contrastive_batch
    images = model.get_image_features(batch()["pixel_values"]).pooler_output
    regions = model.get_image_features(batch()["pixel_values"], BOXES).pooler_output
    one = lambda text, image=None: embed(model, text, image).pooler_output  # noqa: E731
    queries = [one(TEXTS[1]), one(TEXTS[2], 0), one(TEXTS[3], 1), one(TEXTS[6]), one(TEXTS[8])]
    targets = [images, regions[0, :1], regions[1], one([], 0), one(TEXTS[7])]
    for embeds, expected in ((found.query_embeds, queries), (found.target_embeds, targets)):
        torch.testing.assert_close(embeds, F.normalize(torch.cat(expected), dim=-1), atol=1e-5, rtol=1e-5)
    assert found.target_index.tolist() == [5, 1, 4, 1, 6]
    assert found.query_modality.tolist() == [DOCUMENT, IMAGE, REGION, IMAGE, DOCUMENT]
    assert found.target_modality.tolist() == [IMAGE] * 2 + [REGION] * 3 + [DOCUMENT] * 2
    found.check()


def test_what_captions_are_drawn_from_comes_with_the_batch_alone():
    model = tiny()
    expected = model.get_image_features(batch()["pixel_values"]).last_hidden_state  # (I, N, C)
    torch.testing.assert_close(run(model).visual_tokens, expected)
    assert model(**batch()).visual_tokens is None


def from_memory_by_hand(model):
    """Summed loss of rows 4 and 5, each run alone behind the states of the bare image."""
    memory = embed(model, [], 0).last_hidden_state  # (1, K, H)
    total, words = 0.0, model.get_input_embeddings()
    for row, start in ((4, ANSWER_STARTS), (5, 0)):
        text = torch.tensor([[*TEXTS[row], EOS]])
        logits = model.language_model(inputs_embeds=torch.cat([memory, words(text)], dim=1)).logits[0]
        total = total + F.cross_entropy(logits[K - 1 + start : -1], text[0, start:], reduction="sum")
    return total


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_what_is_written_from_memory_costs_what_it_costs_alone(side, attention):
    model = tiny(text_attention=attention)
    labels = batch(side)["labels"]
    labels[6] = IGNORED_LABEL
    loss = run(model, side=side, labels=labels).caption_loss
    torch.testing.assert_close(loss, from_memory_by_hand(model) / 5, atol=1e-5, rtol=1e-5)  # 3 words, 2 end tokens


def test_gradients_reach_the_tower_through_the_memory():
    model = tiny()
    labels = batch()["labels"]
    labels[6] = IGNORED_LABEL
    run(model, labels=labels).caption_loss.backward()
    found = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    (from_memory_by_hand(model) / 5).backward()
    assert model.embedding_tokens.grad.any() and model.token_projection[1].weight.grad.any()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_answers_move_only_through_the_memory():
    model = tiny()
    labels = batch()["labels"]
    labels[6] = IGNORED_LABEL
    other = batch()["pixel_values"]
    other[0] += 1.0

    def losses(**changes):
        return [
            run(model, labels=labels, pixel_values=p, **changes).caption_loss for p in (batch()["pixel_values"], other)
        ]

    through_the_image, moved = losses()
    assert (through_the_image - moved).abs() > 1e-4
    # The memory now holds no image; the answer's own image is still in the batch, and changes.
    fused_index = torch.tensor(ROWS["fused_index"])
    fused_index[0] = -1
    without_it, unmoved = losses(fused_index=fused_index)
    assert without_it == unmoved and without_it != through_the_image


def test_without_anything_to_recall_the_loss_is_that_of_the_image_alone():
    model = tiny()
    none = torch.full((9,), -1)
    labels = batch()["labels"]
    labels[4:6] = IGNORED_LABEL
    given = run(model, labels=labels, memory_row=none)
    torch.testing.assert_close(given.caption_loss, run(model, labels=labels, memory_row=None).caption_loss)
    labels = torch.full_like(labels, IGNORED_LABEL)
    nothing = model(input_ids=torch.zeros(0, 3).long(), return_loss=True, image_index=none[:0], memory_row=none[:0])
    nothing.loss.backward()
    assert nothing.loss == 0
    # Every parameter has a part in every step, or DDP waits for it.
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert [name for name in without if not name.startswith("vision_tower.head.")] == []


def test_equal_texts_with_different_images_are_different_queries():
    ids = batch()["input_ids"]
    ids[3], mask = ids[2], batch()["attention_mask"]
    mask[3] = mask[2]
    found = run(tiny(), input_ids=ids, attention_mask=mask).contrastive_batch
    assert found.query_ids[1] != found.query_ids[2]
    same_image = run(tiny(), input_ids=ids, attention_mask=mask, image_ids=torch.tensor([7, 7])).contrastive_batch
    assert same_image.query_ids[1] == same_image.query_ids[2]


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("target_row", 8, 9, "`target_row` is .* expected 9 numbers below 9"),
        ("fused_index", 2, 2, "`fused_index` is .* below 2"),
        ("memory_row", 4, 9, "`memory_row` is .* below 9"),
        ("image_index", 8, 2, "`image_index` is .* below 2"),
    ],
)
def test_pointers_to_nothing_are_refused(name, row, value, message):
    index = torch.tensor(ROWS[name])
    index[row] = value
    with pytest.raises(ValueError, match=message):
        run(tiny(), **{name: index})


# Generation from memory


def test_generation_from_memory_is_greedy_decoding_behind_it():
    model = tiny()
    memory = embed(model, [], 0).last_hidden_state
    question = torch.tensor([TEXTS[4]])
    found = model.generate(input_ids=question, embedding_tokens=memory, max_new_tokens=4, do_sample=False)
    embeds = torch.cat([memory, model.get_input_embeddings()(question)], dim=1)
    expected = []
    for _ in range(4):
        expected.append(int(model.language_model(inputs_embeds=embeds).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[expected[-1]]]))], dim=1)
    assert found.tolist() == [expected]


def test_questions_of_a_batch_do_not_see_each_other():
    model = tiny()
    memory = torch.cat([embed(model, [], image).last_hidden_state for image in (0, 1)])
    ids, mask = torch.tensor([[1, 1, 41], [51, 52, 53]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    options = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    together = model.generate(input_ids=ids, attention_mask=mask, embedding_tokens=memory, **options).scores
    for row, alone in enumerate((torch.tensor([[41]]), torch.tensor([[51, 52, 53]]))):
        scores = model.generate(input_ids=alone, embedding_tokens=memory[[row]], **options).scores
        for one, other in zip(together, scores, strict=True):
            torch.testing.assert_close(one[row], other[0], atol=1e-5, rtol=1e-5)


def test_a_caption_needs_no_question_and_no_tower():
    model = tiny()
    memory = embed(model, [], 0).last_hidden_state
    model.vision_tower = None
    caption = model.generate(embedding_tokens=memory, max_new_tokens=3, do_sample=False)
    none = torch.zeros(1, 0, dtype=torch.long)
    assert torch.equal(
        caption, model.generate(input_ids=none, embedding_tokens=memory, max_new_tokens=3, do_sample=False)
    )
    shorter = model.generate(embedding_tokens=memory[:, :1], max_new_tokens=3, do_sample=False)
    assert shorter.shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_tokens": torch.zeros(1, K + 1, 32)}, r"`embedding_tokens` has shape \(1, 4, 32\); expected"),
        ({"embedding_tokens": torch.zeros(1, 0, 32)}, "`embedding_tokens` has shape"),
        ({"embedding_tokens": torch.zeros(1, K, 31)}, "`embedding_tokens` has shape"),
        ({"embedding_tokens": torch.zeros(2, K, 32), "input_ids": torch.ones(1, 2).long()}, "holds 2 memories for 1"),
        ({"embedding_tokens": torch.zeros(1, K, 32), "pixel_values": torch.zeros(1, 3, 32, 32)}, "both given"),
        (
            {"embedding_tokens": torch.zeros(1, K, 32), "input_ids": torch.full((1, 2), IMAGE_TOKEN)},
            "image placeholders beside",
        ),
    ],
)
def test_what_is_no_memory_of_this_model_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny().generate(**arguments)


@pytest.mark.parametrize("bos", [5, None])
@pytest.mark.parametrize("text", [[5, 41], [5], []])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_beginning_token_stays_the_first_and_padding_goes_left(bos, text, side):
    model = tiny()
    model.config.text_config.bos_token_id = bos
    memory = embed(model, [], 0).last_hidden_state
    padding = [1] * (3 - len(text))
    ids = torch.tensor([padding + text if side == "left" else text + padding])
    mask = torch.tensor(
        [[0] * len(padding) + [1] * len(text) if side == "left" else [1] * len(text) + [0] * len(padding)]
    )
    embeds, mask = model._embed_recall(memory, ids, mask)
    words = model.get_input_embeddings()(torch.tensor(text, dtype=torch.long))
    expected = torch.cat([words[:1], memory[0], words[1:]] if bos else [memory[0], words])
    assert mask[0].tolist() == [0] * (mask.shape[1] - len(expected)) + [1] * len(expected)
    torch.testing.assert_close(embeds[0, -len(expected) :], expected)


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), 5])
def test_where_nothing_is_written_the_caption_loss_is_zero(count):
    nothing = torch.full_like(batch()["labels"], IGNORED_LABEL)
    output = run(tiny(), labels=nothing, num_items_in_batch=count)
    assert output.caption_loss == 0 and output.contrastive_batch.query_embeds.isfinite().all()


def test_a_text_with_a_target_row_is_a_query_by_default():
    rows = {"image_index": torch.full((9,), -1), "box_index": torch.full((9,), -1), "memory_row": None, "boxes": None}
    found = run(tiny(), **rows, contrastive_mask=None).contrastive_batch
    assert found.query_modality.tolist() == [DOCUMENT] * 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("box_index", torch.tensor([1, -1, -1, -1, -1, -1, -1, -1, -1]), "each of a box .* that is no padding"),
        ("box_index", torch.tensor([-1, -1, -1, 2, -1, -1, -1, -1, -1]), "each of a box .* that is no padding"),
        ("box_index", torch.tensor([-1, -1]), "expected 9 numbers"),
        (
            "contrastive_mask",
            torch.tensor([0, 1, 1, 1, 0, 0, 1, 0, 1]),
            r"torch.int64 of .*expected \(9,\) torch.bool",
        ),
        ("contrastive_mask", torch.tensor([True]), r"expected \(9,\) torch.bool"),
        ("hard_negative_mask", torch.zeros(9), r"torch.float32 of .*expected \(9,\) torch.bool"),
        ("labels", torch.zeros(9, 2, dtype=torch.long), r"`labels` has shape \(9, 2\); expected that of `input_ids`"),
        ("image_ids", torch.arange(3), r"`image_ids` has shape \(3,\); expected \(2,\)"),
        ("boxes", BOXES * 32, r"`boxes` has \[0.0, 0.0, 16.0, 16.0\]; expected .* in \[0, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match=message):
        run(tiny(), **{name: value})


# The parts of a step, each by what it is alone


def caption_by_hand(model, visual_tokens, text):
    """Summed loss of a text after visual tokens (n, C)."""
    tokens = torch.tensor([[*text, EOS]])
    embeds = torch.cat([model.token_projection(visual_tokens)[None], model.get_input_embeddings()(tokens)], dim=1)
    logits = model.language_model(inputs_embeds=embeds).logits[0, N - 1 : -1]
    return F.cross_entropy(logits, tokens[0], reduction="sum")


@pytest.mark.parametrize("side", ["left", "right"])
def test_captions_of_boxes_and_images_cost_what_they_cost_alone(side):
    model, inputs = tiny(), batch(side)
    inputs["box_index"][1] = 0
    labels, mask = torch.full_like(inputs["labels"], IGNORED_LABEL), inputs["attention_mask"].bool()
    for row in (1, 3, 6):  # of box 0 of image 0, of box 1 of image 1, of image 1
        labels[row, mask[row]] = inputs["input_ids"][row, mask[row]]
    output = model(**inputs | {"labels": labels}, return_contrastive_batch=True)
    images = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    boxes = model.get_image_features(inputs["pixel_values"], BOXES).last_hidden_state
    shown = {1: boxes[0, 0], 3: boxes[1, 1], 6: images[1]}
    expected = sum(caption_by_hand(model, tokens, TEXTS[row]) for row, tokens in shown.items())
    torch.testing.assert_close(output.caption_loss, expected / 9, atol=1e-5, rtol=1e-5)  # 6 words, 3 end tokens


def test_a_step_of_a_trainer_weighs_the_contrastive_loss_by_tokens():
    model, inputs = tiny(), batch()
    alone = model(**inputs)
    torch.testing.assert_close(alone.loss, alone.caption_loss + alone.contrastive_loss)
    assert alone.contrastive_loss == ContrastiveObjective()(alone.contrastive_batch)
    written, counted = 8, int((inputs["labels"][:, 1:] != IGNORED_LABEL).sum())  # with three end tokens
    shared = model(**inputs, num_items_in_batch=20)
    torch.testing.assert_close(shared.caption_loss * 20, alone.caption_loss * written)
    expected = counted / written * (shared.caption_loss + alone.contrastive_loss * written / 20)
    torch.testing.assert_close(shared.loss, expected)
    assert counted not in (written, 20)


@pytest.mark.parametrize("pooling", ["mean", "multi_vector"])
def test_a_step_says_how_long_embeddings_are_and_hands_on_scale_and_bias(pooling):
    model = tiny(embedding_pooling=pooling, logit_bias_init_value=-2.5)
    output = run(model)
    images = model.get_image_features(batch()["pixel_values"]).pooler_output
    torch.testing.assert_close(output.image_norm, images.norm(dim=-1).mean())
    embedded = [([], 0), (TEXTS[1], None), (TEXTS[2], 0), (TEXTS[3], 1), (TEXTS[6], None), (TEXTS[7], None)]
    texts = [embed(model, *one).pooler_output for one in (*embedded, (TEXTS[8], None))]
    torch.testing.assert_close(output.text_norm, torch.cat(texts).norm(dim=-1).mean(), atol=1e-4, rtol=1e-4)
    found = output.contrastive_batch
    assert found.logit_bias == -2.5 and found.logit_bias.ndim == 0
    torch.testing.assert_close(found.logit_scale, model.logit_scale.exp().squeeze())
    assert run(tiny()).contrastive_batch.logit_bias is None


def test_states_and_patches_that_are_known_take_the_place_of_both_towers():
    model = tiny()
    inputs = batch(labels=torch.full_like(batch()["labels"], IGNORED_LABEL), memory_row=None)
    inputs["fused_index"] = torch.full((9,), -1)
    inputs["input_ids"][0, 0], inputs["attention_mask"][0, 0] = 21, 1  # else it is nothing, alone
    expected = model(**inputs)
    known = {
        "text_states": torch.cat([embed(model, text).last_hidden_state for text in [[21], *TEXTS[1:]]]).double(),
        "patch_features": model._patch_grid(inputs.pop("pixel_values")).double(),
    }
    output = model(**inputs, **known)
    for name in ("query_embeds", "target_embeds", "target_index", "query_ids"):
        torch.testing.assert_close(
            output.contrastive_batch[name], expected.contrastive_batch[name], atol=1e-5, rtol=1e-5
        )
    assert output.caption_loss == 0
    torch.testing.assert_close(output.loss, expected.contrastive_loss, atol=1e-5, rtol=1e-5)
    refused = {
        "`text_states` came with texts that are generated": {"labels": batch()["labels"]},
        "`text_states` came with texts": {"fused_index": torch.tensor([-1, -1, 0, -1, -1, -1, -1, -1, -1])},
        r"`text_states` has shape \(9, 2, 32\); expected": {"text_states": known["text_states"][:, :2]},
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            model(**inputs | known | changes)


@pytest.mark.parametrize("packing", ["position_ids", "none"])
def test_a_model_that_cannot_be_packed_gets_a_row_for_each_text(packing):
    model, shapes = tiny(), []
    expected = run(model)
    model.config.sequence_packing = packing
    run_decoder = model._run_decoder

    def note(embeds, *rest, **options):
        if len(rest) == 2:  # else it is the probe
            shapes.append((len(embeds), rest[0] is None))
        return run_decoder(embeds, *rest, **options)

    model._run_decoder = note
    output = run(model)
    torch.testing.assert_close(output.caption_loss, expected.caption_loss)
    torch.testing.assert_close(output.contrastive_batch.query_embeds, expected.contrastive_batch.query_embeds)
    # Seven texts are embedded, and one is written from an image; then two are from memory.
    (first, is_whole), (then, _) = shapes[-2:]
    assert (first, then, is_whole) == (8, 2, True) if packing == "none" else first < 8 and not is_whole


def test_noise_on_embeddings_is_refused():
    model = tiny()
    model.get_input_embeddings().neftune_noise_alpha = 5
    with pytest.raises(ValueError, match="`neftune_noise_alpha` is 5, but its noise depends on the length"):
        run(model)


def rows_of_step(**changes) -> TextRows:
    inputs = batch(**changes)
    return TextRows.from_columns(inputs, 2, BOXES)


def test_whether_a_step_shows_an_image():
    nothing = {"labels": torch.full((9, 4), IGNORED_LABEL), "fused_index": torch.full((9,), -1)}
    shows = JointStep._shows_images
    assert shows(rows_of_step()) and not shows(rows_of_step(**nothing))
    for row, is_shown in ((1, True), (3, False), (4, False), (6, True)):  # 3 is of a box, 4 from a memory
        labels = nothing["labels"].clone()
        labels[row, 0] = 11
        image_index = torch.tensor(ROWS["image_index"])
        image_index[row] = 0
        one = {"labels": labels, "image_index": image_index, "box_index": torch.full((9,), -1)}
        one["box_index"][row] = 0 if row == 3 else -1
        assert shows(rows_of_step(**nothing | one)) == is_shown
    fused = nothing["fused_index"].clone()
    fused[2] = 0
    assert shows(rows_of_step(**nothing | {"fused_index": fused}))


@pytest.mark.parametrize("attention", ["image", "prompt", "causal"])
@pytest.mark.parametrize("text_attention", ["causal", "bidirectional"])
def test_only_tokens_of_one_image_or_prompt_or_text_are_in_a_block(attention, text_attention):
    fused = torch.tensor([[0, 1], [-1, -1], [0, 0], [1, -1], *[[-1, -1]] * 5])
    labels = batch()["labels"]
    labels[3, 0] = 31  # after a box
    rows = rows_of_step(fused_index=fused, labels=labels)
    config = tiny().config
    parts = caption_sequences(rows, 6, N, config), embedded_sequences(rows, 6, K, config)
    step = SimpleNamespace(
        config=SimpleNamespace(vlm_attention=attention, text_attention=text_attention), _of_box=JointStep._of_box
    )
    blocks = JointStep._blocks(step, rows, *parts).split([len(part.token_ids) for part in parts])
    of_box = JointStep._of_box(rows, parts[0])
    units, members = set(), {}
    for number, (part, own) in enumerate(zip(parts, blocks, strict=True)):
        shown = part.is_prefix & ~of_box if number == 0 else part.is_prefix
        sees = set(part.sequence[shown].tolist())
        for place, block in enumerate(own.tolist()):
            sequence, unit = (number, int(part.sequence[place])), int(part.unit[place])
            if number == 1 and text_attention == "bidirectional":
                expected = None if part.is_suffix[place] else ("text", sequence)
            elif attention == "image":
                expected = ("image", number, unit) if shown[place] else None
            elif attention == "prompt":
                expected = ("prompt", sequence) if sequence[1] in sees and part.is_prompt[place] else None
            else:
                expected = None
            assert (block < 0) == (expected is None), (number, place)
            if expected is not None:
                assert members.setdefault(block, expected) == expected
                units.add(expected)
    assert len(members) == len(units)


def test_first_boxes_of_first_images_and_hard_negatives_have_their_targets():
    image_index, box_index = torch.tensor(ROWS["image_index"]), torch.tensor(ROWS["box_index"])
    hard = torch.zeros(9, dtype=torch.bool)
    hard[6] = True
    for image, box, target in ((0, 0, 2), (1, 0, 3), (1, 1, 4)):
        image_index[3], box_index[3] = image, box
        found = run(tiny(), image_index=image_index, box_index=box_index, hard_negative_mask=hard).contrastive_batch
        assert found.target_index.tolist() == [5, 1, target, -1, 6] and found.query_modality[2] == REGION


def test_few_or_no_tokens_of_a_step_are_counted_as_they_are():
    model, inputs = tiny(), batch()
    alone = model(**inputs)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=1).caption_loss, alone.caption_loss * 8)
    nothing = model(**inputs | {"labels": torch.full_like(inputs["labels"], IGNORED_LABEL)}, num_items_in_batch=0)
    assert nothing.loss == nothing.contrastive_loss and nothing.caption_loss == 0


def test_a_step_that_writes_one_token_weighs_by_it():
    inputs = batch()
    inputs["image_index"][1] = -1  # a text of one word and its end, of which the word is predicted from nothing
    inputs["input_ids"][1, :2] = torch.tensor([11, EOS])
    inputs["attention_mask"][1] = torch.tensor([1, 1, 0, 0])
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED_LABEL)
    inputs["labels"][1, 1] = EOS
    output = tiny()(**inputs, num_items_in_batch=4)
    torch.testing.assert_close(output.loss, output.caption_loss + output.contrastive_loss / 4)
