"""The schema of the texts of a batch: what it accepts, what it refuses by name, and how parts of a batch count."""

import pytest
import torch
from joint_batches import joint_batch, joint_model

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.text_rows import TEXT_COLUMNS, Role, TextRows, select_texts


def test_forward_documents_every_column():
    for name, column in TEXT_COLUMNS.items():
        assert f"{name}: " in TextRows.__doc__
        first_words = " ".join(column.description.split()[:4])
        assert column.role is Role.TOKENS or first_words in " ".join(MMGEMModel.forward.__doc__.split()), name


@pytest.mark.parametrize("name", ["image_idx", "row_index", "output_attentions"])
def test_forward_refuses_what_is_no_column(name):
    with pytest.raises(ValueError, match=f"`{name}` is no column of the texts of a batch; expected some of input_ids"):
        joint_model()(**joint_batch(), **{name: torch.arange(9)})


def test_columns_are_refused_where_nothing_reads_them():
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="`image_index` came without `return_loss=True`"):
        joint_model()(input_ids=ids, image_index=torch.tensor([-1]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fused_index", torch.full((9, 2), 2), "expected 9 lists of numbers below 2, or -1 for none"),
        ("fused_index", torch.zeros(9, 1, 1).long(), "`fused_index` is .*expected 9 "),
        ("image_index", torch.zeros(9, 1).long(), "`image_index` is .*expected 9 numbers below 2"),
        ("image_index", torch.zeros(9), "`image_index` is .*expected 9 numbers below 2"),
        ("memory_row", torch.full((9,), -2), "`memory_row` is .*expected 9 numbers below 9, or -1 for none"),
    ],
)
def test_pointers_of_a_wrong_shape_type_or_size_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        joint_model()(**joint_batch(**{name: value}))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_text_after_several_images_is_embedded_as_alone(side, attention):
    model = joint_model(text_attention=attention)
    fused_index = torch.full((9, 2), -1)
    fused_index[0, 0], fused_index[2], fused_index[3] = 0, torch.tensor([1, 0]), torch.tensor([0, 0])
    batch = joint_batch(side, fused_index=fused_index)
    found = model(**batch, return_contrastive_batch=True).contrastive_batch
    n, image_token = model.config.num_visual_tokens, model.config.image_token_id
    for query, text, images in ((1, [21, 22], [1, 0]), (2, [31], [0, 0])):
        ids = torch.tensor([[image_token] * n * 2 + text])
        alone = model.get_multimodal_features(ids, None, batch["pixel_values"][images]).pooler_output
        expected = torch.nn.functional.normalize(alone, dim=-1)[0]
        torch.testing.assert_close(found.query_embeds[query], expected, atol=1e-5, rtol=1e-5)


def test_the_order_of_images_before_a_text_tells_queries_apart():
    fused_index = torch.full((9, 2), -1)
    fused_index[0, 0] = 0
    ids = joint_batch()["input_ids"]
    ids[3], mask = ids[2], joint_batch()["attention_mask"]
    mask[3] = mask[2]
    query_ids = []
    for second in ([0, 1], [1, 0], [1, -1]):
        fused_index[2], fused_index[3] = torch.tensor([0, 1]), torch.tensor(second)
        batch = joint_batch(fused_index=fused_index, input_ids=ids, attention_mask=mask)
        query_ids.append(joint_model()(**batch, return_contrastive_batch=True).contrastive_batch.query_ids[1:3])
    assert [bool(one == other) for one, other in query_ids] == [True, False, False]


def test_selected_texts_point_as_before():
    batch = joint_batch()
    texts = torch.tensor([8, 7, 3])
    part = select_texts(batch, texts, range(1, 2))
    assert part["image_index"].tolist() == [0, 0, 0] and part["fused_index"].tolist() == [-1, -1, 0]
    assert part["target_row"].tolist() == [1, -1, -1] and part["box_index"].tolist() == [-1, -1, 1]
    assert torch.equal(part["input_ids"], batch["input_ids"][texts])
    with pytest.raises(ValueError, match="`image_index` points to an image that is not selected"):
        select_texts(batch, texts, range(0, 1))
    with pytest.raises(ValueError, match="`target_row` points to a text that is not selected"):
        select_texts(batch, texts[:1], range(0, 2))
