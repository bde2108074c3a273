import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build_model

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.reconstruction.head import normalized_patches
from mmgem.training.reconstruction.model import MMGEMForReconstruction

N = 4  # visual tokens
BOXES = torch.tensor([[[0.0, 0.0, 0.5, 0.75]], [[0.25, 0.25, 1.0, 1.0]]])


def build(vision="siglip", text="llama", **config):
    model = MMGEMForReconstruction.from_model(build_model(vision, text, text_attention="bidirectional", **config))
    torch.nn.init.normal_(model.reconstruction_head.mask_patch)
    return model


@pytest.fixture
def inputs(pixel_values, text_batch):
    """Two images; texts about the first, about the second and about none, with one, two and one masked tokens."""
    text_mask = torch.zeros(3, 7, dtype=torch.bool)
    text_mask[0, 2] = text_mask[1, 0] = text_mask[1, 3] = text_mask[2, 1] = True
    patch_mask = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    return text_batch | {
        "pixel_values": pixel_values[:2],
        "text_mask": text_mask,
        "patch_mask": patch_mask,
        "image_index": torch.tensor([0, 1, -1]),
    }


def changed(inputs, **changes):
    """A copy of the inputs in which values at places, (name, index), are others."""
    return {name: changes[name](value.clone()) if name in changes else value for name, value in inputs.items()}


def put(*index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def by_hand(model, inputs):
    """Every sequence alone, under a mask of all ones."""
    images, head = inputs["pixel_values"].clone(), model.reconstruction_head
    for image, row, column in inputs["patch_mask"].nonzero().tolist():
        images[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = head.mask_patch
    tokens = model.get_image_features(images).last_hidden_state
    if (boxes := inputs.get("boxes")) is not None:
        box_tokens = model.get_image_features(images, boxes).last_hidden_state[:, 0]
    box_index = inputs.get("box_index", torch.full((3,), -1))
    text_losses, states_of_image = [], {}
    rows = [(row, int(inputs["image_index"][row])) for row in range(3)]
    for row, image in [*rows, *((None, image) for image in range(2))]:
        ids, mask = inputs["input_ids"][row or 0], inputs["text_mask"][row or 0]
        is_token = inputs["attention_mask"][row or 0].bool() & (row is not None)
        ids, mask = ids[is_token], mask[is_token]
        embeds = model.get_input_embeddings()(ids).masked_fill(mask[:, None], 0) + mask[:, None] * head.mask_embedding
        if image >= 0:
            shown = box_tokens[image] if row is not None and box_index[row] >= 0 else tokens[image]
            embeds = torch.cat([model.token_projection(shown), embeds])
        length = len(embeds)
        every = torch.zeros(1, 1, length, length)  # added to the scores
        states = model.language_model.get_decoder()(inputs_embeds=embeds[None], attention_mask=every).last_hidden_state
        logits = model.language_model.lm_head(states[0])
        start = length - len(ids)
        for place in mask.nonzero()[:, 0].tolist():
            text_losses.append(F.cross_entropy(logits[start + place - 1], ids[place]))
        if image >= 0 and (row is None or box_index[row] < 0):
            states_of_image.setdefault(image, states[0, :N])
    pixels = head(torch.stack([states_of_image[0], states_of_image[1]]), inputs["patch_mask"])
    patches = [
        inputs["pixel_values"][image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
        for image, row, column in inputs["patch_mask"].nonzero().tolist()
    ]
    targets = torch.stack(patches)
    targets = (targets - targets.mean(-1, keepdim=True)) / targets.std(-1, keepdim=True, correction=0)
    return torch.stack(text_losses).mean(), (pixels - targets).square().mean()


@pytest.mark.parametrize("vision", ["siglip", "clip", "siglip2", "dinov2_with_registers"])
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_losses_are_those_of_each_sequence_alone(inputs, vision, text):
    model = build(vision, text)
    outputs, expected = model(**inputs), by_hand(model, inputs)
    torch.testing.assert_close((outputs.text_loss, outputs.patch_loss), expected, rtol=1e-4, atol=1e-5)


def test_a_text_may_stand_behind_a_box(inputs):
    model = build()
    inputs |= {"boxes": BOXES, "box_index": torch.tensor([-1, 0, -1])}  # so the second image is put back by itself
    outputs, expected = model(**inputs), by_hand(model, inputs)
    torch.testing.assert_close((outputs.text_loss, outputs.patch_loss), expected, rtol=1e-4, atol=1e-5)
    other = model(**inputs | {"boxes": BOXES.flip(0)})
    assert (other.text_loss - outputs.text_loss).abs() > 1e-5
    torch.testing.assert_close(other.patch_loss, outputs.patch_loss)


def test_padding_side_and_empty_texts_do_not_matter(inputs):
    model = build()
    expected = model(**inputs)
    left = {name: value.clone() for name, value in inputs.items()}
    for row, length in enumerate([7, 5, 3]):
        for name in ("input_ids", "attention_mask", "text_mask"):
            left[name][row] = left[name][row].roll(7 - length)
    for name in ("input_ids", "attention_mask", "text_mask", "image_index"):
        nothing = torch.full_like(left[name][:1], -1 if name == "image_index" else 0)
        left[name] = torch.cat([left[name], nothing])
    actual = model(**left)
    torch.testing.assert_close((actual.text_loss, actual.patch_loss), (expected.text_loss, expected.patch_loss))


def test_a_masked_token_is_put_back_from_both_sides(inputs):
    model = build()
    inputs["text_mask"][:] = False
    inputs["text_mask"][0, 2] = True
    losses = model(**inputs)
    for place in (1, 3, 6):  # before it, behind it and last of all
        other = model(**changed(inputs, input_ids=put(0, place, value=7)))
        assert (other.text_loss - losses.text_loss).abs() > 1e-5, place
        assert (other.patch_loss - losses.patch_loss).abs() > 1e-6, place
    pixels = ~inputs["patch_mask"][0].repeat_interleave(8, 0).repeat_interleave(8, 1)
    visible = model(**changed(inputs, pixel_values=put(0, slice(None), pixels, value=0.5)))
    assert (visible.text_loss - losses.text_loss).abs() > 1e-5


def test_the_first_state_sees_the_last_token(inputs):
    """And so it does where texts are embedded, while prompts and captions are read from left to right."""
    model = build()
    model._check_reading()  # which the first run does, by runs of its own
    seen = []
    decoder = model.language_model.get_decoder()
    decoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.detach()))
    other = changed(inputs, input_ids=put(0, 6, value=7))
    for batch in (inputs, other):
        model(**batch)
    moved = (seen[1] - seen[0]).abs().amax(-1) > 1e-6  # (rows, row length)
    assert moved.sum() == 7 + N  # the whole of that sequence, from its first visual token on, and no other

    seen.clear()
    for batch in (inputs, other):
        model.get_text_features(batch["input_ids"], batch["attention_mask"])
    assert (seen[1][0, 0] - seen[0][0, 0]).abs().max() > 1e-6


@pytest.mark.parametrize("released", [False, True])
def test_prompts_and_captions_stay_causal(inputs, released):
    model = build()
    model = model.released() if released else model
    batches = [inputs, changed(inputs, input_ids=put(0, 6, value=7))]
    images = torch.full((1, N), model.config.image_token_id)
    logits, losses = [], []
    for batch in batches:
        prompt = torch.cat([images, batch["input_ids"][:1]], dim=1)
        logits.append(model(input_ids=prompt, pixel_values=inputs["pixel_values"][:1]).logits)
        labels = torch.full_like(batch["input_ids"], -100)
        labels[0, :6] = batch["input_ids"][0, :6]
        texts = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_index")}
        losses.append(model(**texts, labels=labels, return_loss=True).caption_loss)
    torch.testing.assert_close(logits[0][:, :-1], logits[1][:, :-1])
    assert (logits[0][:, -1] - logits[1][:, -1]).abs().max() > 1e-4
    torch.testing.assert_close(losses[0], losses[1])
    written = [
        model.generate(
            input_ids=torch.cat([images, inputs["input_ids"][:1]], dim=1),
            pixel_values=inputs["pixel_values"][:1],
            max_new_tokens=4,
            do_sample=False,
            use_cache=cached,
        )
        for cached in (True, False)
    ]
    assert torch.equal(*written)


def test_what_is_masked_is_not_seen(inputs):
    model = build()
    losses = model(**inputs)
    # Another token there is another target, but leaves everything else as it is.
    other = model(**changed(inputs, input_ids=put(0, 2, value=7)))
    assert (other.text_loss - losses.text_loss).abs() > 1e-5
    torch.testing.assert_close(other.patch_loss, losses.patch_loss)
    pixels = inputs["patch_mask"][0].repeat_interleave(8, 0).repeat_interleave(8, 1)
    noise = torch.randn(3, int(pixels.sum()), generator=torch.Generator().manual_seed(4))
    other = model(**changed(inputs, pixel_values=put(0, slice(None), pixels, value=noise)))
    assert (other.patch_loss - losses.patch_loss).abs() > 1e-4
    torch.testing.assert_close(other.text_loss, losses.text_loss)


def test_losses_are_divided_by_what_they_are_told(inputs):
    model = build()
    mean, counts = model(**inputs), torch.tensor([8, 20])
    share = model(**inputs, num_items_in_batch=counts)
    torch.testing.assert_close(share.text_loss, mean.text_loss * 4 / 8)
    torch.testing.assert_close(share.patch_loss, mean.patch_loss * inputs["patch_mask"].sum() / 20)


@pytest.mark.parametrize("given", ["texts", "images", "both"])
def test_every_part_that_is_used_gets_a_gradient_whatever_is_given(inputs, given):
    from mmgem.training.reconstruction.trainer import freeze_read_out
    from mmgem.training.trainer.parameter_selection import freeze_unused

    model = build()
    freeze_unused(model)
    freeze_read_out(model)
    if given == "texts":
        inputs |= {"pixel_values": None, "patch_mask": None, "image_index": torch.full((3,), -1)}
        inputs["text_mask"][1, 0] = False
    if given == "images":
        inputs |= {name: inputs[name][:0] for name in ("input_ids", "attention_mask", "text_mask", "image_index")}
    outputs = model(**inputs)
    assert (outputs.text_loss > 0) == (given != "images") and (outputs.patch_loss > 0) == (given != "texts")
    (outputs.text_loss + outputs.patch_loss).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    idle = [name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not missing and not idle
    assert model.reconstruction_head.mask_embedding.requires_grad and not model.embedding_tokens.requires_grad


def test_one_batch_can_be_learned_by_heart(inputs):
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        outputs = model(**inputs)
        loss = outputs.text_loss + outputs.patch_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((outputs.text_loss.item(), outputs.patch_loss.item()))
    assert losses[0][0] > 5 and losses[-1][0] < 0.5
    assert losses[0][1] > 0.9 and losses[-1][1] < 0.7


def test_the_model_and_its_head_share_nothing_but_the_modules(inputs, pixel_values, tmp_path):
    plain = build_model(text_attention="bidirectional")
    before = copy.deepcopy(plain.state_dict())
    model = MMGEMForReconstruction.from_model(plain)
    assert plain.state_dict().keys() == before.keys() and not hasattr(plain, "reconstruction_head")
    assert all(model.get_parameter(name) is parameter for name, parameter in plain.named_parameters())
    released = model.released()
    assert type(released) is MMGEMModel and released.state_dict().keys() == before.keys()
    assert hasattr(model, "reconstruction_head")

    model.save_pretrained(tmp_path / "trained")  # such as a checkpoint
    loaded = MMGEMForReconstruction.from_pretrained(tmp_path / "trained")
    losses = [tuple(m(**inputs).values()) for m in (loaded, model)]
    torch.testing.assert_close(*losses)
    assert [path.name for path in (tmp_path / "trained").glob("*.py")] == ["configuration_mmgem.py"]
    loaded.released().save_pretrained(tmp_path / "released")
    plain.save_pretrained(tmp_path / "first")
    MMGEMModel.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "plain")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "released" / name).read_text() == (tmp_path / "plain" / name).read_text()
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("released", "plain")]
    assert files[0] == files[1] and "modeling_mmgem.py" in files[0]
    embeds = [
        MMGEMModel.from_pretrained(tmp_path / name).get_image_features(pixel_values) for name in ("released", "plain")
    ]
    torch.testing.assert_close(embeds[0].pooler_output, embeds[1].pooler_output)


def test_patches_of_one_color_have_nothing_to_put_back():
    pixels = torch.stack([torch.full((12,), 0.3), torch.linspace(-1, 1, 12)])
    normalized = normalized_patches(pixels)
    torch.testing.assert_close(normalized[0], torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized[1].var(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_the_places_of_patches_tell_them_apart():
    model = build()
    states, mask = torch.randn(1, N, 32), torch.ones(1, 4, 6, dtype=torch.bool)
    pixels = model.reconstruction_head(states, mask)
    assert pixels.shape == (24, 3 * 8 * 8)
    assert torch.pdist(pixels).min() > 1e-3
    order = torch.tensor([1, 0, 2, 3])
    assert (model.reconstruction_head(states[:, order], mask) - pixels).abs().max() > 1e-3
    half = mask.clone()
    half[:, :2] = False
    torch.testing.assert_close(model.reconstruction_head(states, half), pixels[12:])


def test_a_causal_model_is_refused():
    with pytest.raises(ValueError, match="`text_attention` is 'causal'; expected 'bidirectional'"):
        MMGEMForReconstruction.from_model(build_model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_mask": put(1, 6, value=True)}, "`text_mask` is True for padding"),
        ({"text_mask": put(2, 0, value=True)}, "a token before which nothing stands"),
        ({"text_mask": lambda mask: mask[:, :3]}, r"`text_mask` has shape \(3, 3\), `input_ids` \(3, 7\)"),
        ({"patch_mask": lambda mask: mask[:, :3]}, r"`patch_mask` has shape \(2, 3, 4\); expected \(2, 4, 4\)"),
        ({"image_index": put(0, value=2)}, "`image_index` is .*below 2"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        build()(**changed(inputs, **changes))
    with pytest.raises(ValueError, match="`image_index` is None"):
        build()(**{name: value for name, value in inputs.items() if name != "image_index"})
