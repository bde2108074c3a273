"""Metrics against plain references and analytic cases; the evaluation against a model that knows everything."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmgem.training import evaluation
from mmgem.training.data.grammar import parse_caption, parse_region_caption
from mmgem.training.data.scene_dataset import SceneDataset
from mmgem.training.data.scenes import COLORS, FILLS, PLACES, SHAPES, SIZES
from mmgem.training.encoding import embed_regions, embed_texts
from mmgem.training.evaluation import (
    agreement,
    caption_fidelity,
    cider,
    evaluate_model,
    recall_at,
    region_caption_fidelity,
    retrieval_ranks,
)

COUNT = 12


# ------------------------------------------------------------------------------------------------------- pure metrics


def _ranks_by_sorting(queries, gallery, right):
    """As `retrieval_ranks`, without ties: sort, and find the first right row."""
    ranks = []
    for query, rows in zip(queries, right, strict=True):
        order = np.argsort(-(gallery @ query), kind="stable")
        ranks.append(next(rank for rank, row in enumerate(order) if row in rows))
    return ranks


@pytest.mark.parametrize("max_scores", [2**24, 100, 1])  # at once, in parts, a query at a time
def test_ranks_equal_sorting(max_scores, monkeypatch):
    monkeypatch.setattr(evaluation, "_MAX_SCORES", max_scores)
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(40, 6)), rng.normal(size=(25, 6))
    right = [set(rng.choice(25, size=rng.integers(1, 5), replace=False).tolist()) for _ in queries]
    ranks = retrieval_ranks(torch.tensor(queries), torch.tensor(gallery), right)
    assert ranks.tolist() == _ranks_by_sorting(queries, gallery, right)


def test_ranks_of_perfect_reversed_and_collapsed_embeddings():
    one_hot = torch.eye(5)
    own = [{row} for row in range(5)]
    assert retrieval_ranks(one_hot, one_hot, own).tolist() == [0] * 5
    assert retrieval_ranks(one_hot, -one_hot, own).tolist() == [4] * 5
    assert retrieval_ranks(torch.ones(5, 3), torch.ones(5, 3), own).tolist() == [4] * 5  # ties are not found
    assert retrieval_ranks(torch.full((5, 3), torch.nan), torch.ones(5, 3), own).tolist() == [4] * 5
    assert retrieval_ranks(torch.ones(5, 3), torch.ones(5, 3), [set(range(5))] * 5).tolist() == [0] * 5


def test_ranks_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="one entry for each of the 2 queries, got 1"):
        retrieval_ranks(torch.eye(2), torch.eye(2), [{0}])
    with pytest.raises(ValueError, match="got none for query 1"):
        retrieval_ranks(torch.eye(2), torch.eye(2), [{0}, set()])


def test_recall():
    ranks = torch.tensor([0, 0, 3, 4, 5, 10])
    assert [recall_at(ranks, k) for k in (1, 5, 10, 11)] == pytest.approx([2 / 6, 4 / 6, 5 / 6, 1])


def test_fidelity_judges_meaning_not_words():
    references = ["a red star at the top", "a blue moon on the left", "a cat on a sofa"]
    captions = ["at the top a small solid red star", "a blue moon on the right", "a cat on a sofa"]
    assert caption_fidelity(captions, references) == 0.5  # the third is not of a scene
    assert caption_fidelity(captions[2:], references[2:]) is None
    assert caption_fidelity([""], references[:1]) == 0
    assert region_caption_fidelity(["a little red star", "a big red star"], ["a red star", "a red star"]) == 0.5
    assert agreement(["a", "b", "c", "d"], ["a", "b", "c", "x"]) == 0.75


def test_cider_is_ten_for_the_reference_and_zero_for_other_words():
    references = [["a red star at the top"], ["one blue moon on this left"], ["two green hearts below them"]]
    exact = ["A red star, at the top.", "one blue moon on this left!", "two green hearts below them"]
    assert cider(exact, references) == pytest.approx(10)
    assert cider(["x y z w"] * 3, references) == 0
    assert 0 < cider(["a red moon at the top", *exact[1:]], references) < 10


def test_cider_refuses_what_means_nothing():
    with pytest.raises(ValueError, match="2 images or more"):
        cider(["a"], [["a"]])
    with pytest.raises(ValueError, match="one entry for each of the 2 captions, got 1"):
        cider(["a", "b"], [["a"]])


# --------------------------------------------------------------------------------------------------------- evaluation


class KnowingProcessor:
    """Images as their pixels, texts as their bytes; the image token is expanded to one byte of value 1."""

    image_token = "<image>"
    pad = 0

    @property
    def tokenizer(self):
        return self

    def __call__(self, images=None, text=None, boxes=None, padding=True, return_tensors="pt"):
        inputs = {}
        if images is not None:
            inputs["pixel_values"] = torch.stack([torch.from_numpy(np.array(image)).float() for image in images])
        if boxes is not None:
            padded = torch.zeros(len(boxes), max(map(len, boxes)), 4)
            for row, own in zip(padded, boxes, strict=True):
                row[: len(own)] = torch.tensor(own)
            inputs["boxes"] = padded
        if text is not None:
            inputs["input_ids"] = self.encode([sample.replace("<image>", "\1") for sample in text])
            inputs["attention_mask"] = (inputs["input_ids"] != self.pad).long()
        return inputs

    def encode(self, texts):
        rows = [torch.tensor(list(text.encode())) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)

    def batch_decode(self, ids, skip_special_tokens=True):
        return [bytes(value for value in row if value != self.pad).decode() for row in ids.tolist()]


class KnowingModel(torch.nn.Module):
    """Knows every image by its pixels and every text by its meaning: all metrics must be 1."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, rows):
        super().__init__()
        self.rows = {self._key(np.array(row["image"])): row for row in rows}
        self.text_batches = []

    @staticmethod
    def _key(pixels):
        return np.asarray(pixels, dtype=np.uint8).tobytes()

    def _rows(self, pixel_values):
        return [self.rows[self._key(pixels.numpy())] for pixels in pixel_values]

    def _embed(self, text):
        """One number for each object there could be, and some for the subject's color and shape."""
        objects, look = parse_caption(text), parse_region_caption(text)
        vector = torch.zeros(len(SHAPES), len(COLORS), len(FILLS), len(SIZES), len(PLACES) + 2)
        for item in objects or ():
            vector[self._position(item) + (PLACES.index(item.place),)] = 1
            if item.size == "large":
                vector[SHAPES.index(item.shape), COLORS.index(item.color), 0, 0, -1] = 0.1
        if text.startswith("a picture"):
            vector[SHAPES.index(look.shape), COLORS.index(look.color), 0, 0, -1] = 1
        elif look:
            vector[self._position(look) + (-2,)] = 1
        return vector.flatten()

    @staticmethod
    def _position(look):
        return SHAPES.index(look.shape), COLORS.index(look.color), FILLS.index(look.fill), SIZES.index(look.size)

    def get_image_features(self, pixel_values, boxes=None):
        assert not self.training and torch.is_inference_mode_enabled()
        rows = self._rows(pixel_values)
        if boxes is None:
            return _Output(torch.stack([3 * self._embed(row["captions"][0]) for row in rows]))
        regions = [torch.stack([self._embed(text) for text in row["region_captions"]]) for row in rows]
        regions = torch.nn.utils.rnn.pad_sequence(regions, batch_first=True)
        assert regions.shape[:2] == boxes.shape[:2]
        return _Output(regions)

    def get_text_features(self, input_ids, attention_mask):
        assert not self.training and torch.is_inference_mode_enabled()
        self.text_batches.append(attention_mask)
        return _Output(torch.stack([self._embed(text) for text in KnowingProcessor().batch_decode(input_ids)]))

    def generate(self, input_ids, attention_mask, pixel_values, boxes=None, max_new_tokens=None, do_sample=None):
        assert not self.training and torch.is_inference_mode_enabled()
        assert (input_ids == 1).all() and do_sample is False
        rows = self._rows(pixel_values)
        texts = [row["captions"][-1] for row in rows]
        if boxes is not None:
            texts = [text for row in rows for text in row["region_captions"]]
        return torch.cat([input_ids, KnowingProcessor().encode(texts)], dim=1)


class _Output:
    def __init__(self, pooler_output):
        self.pooler_output = pooler_output


class IgnorantModel(KnowingModel):
    """Sees the same in every image and says the same of it."""

    def get_image_features(self, pixel_values, boxes=None):
        output = super().get_image_features(pixel_values, boxes)
        return _Output(torch.ones_like(output.pooler_output))

    def generate(self, input_ids, **kwargs):
        return torch.cat([input_ids, KnowingProcessor().encode(["a picture of a cat"] * len(input_ids))], dim=1)


@pytest.fixture(scope="module")
def rows():
    return list(SceneDataset(8, COUNT, image_size=48, unique=True))


def test_a_model_that_knows_everything_scores_one(rows):
    metrics = evaluate_model(KnowingModel(rows), KnowingProcessor(), rows, batch_size=5)
    names = {f"{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    names |= {"long_text_to_image_recall@1", "zero_shot_accuracy", "caption_fidelity", "cider"}
    names |= {"region_recall@1", "region_caption_fidelity"}
    assert set(metrics) == names
    assert metrics.pop("cider") > 1
    assert metrics == {name: 1 for name in metrics}


def test_a_model_that_knows_nothing_scores_zero(rows):
    metrics = evaluate_model(IgnorantModel(rows), KnowingProcessor(), rows, batch_size=5)
    for name in (
        "text_to_image_recall@1",
        "text_to_image_recall@10",
        "long_text_to_image_recall@1",
        "region_recall@1",
    ):
        assert metrics[name] == 0
    assert metrics["caption_fidelity"] == metrics["region_caption_fidelity"] == 0
    assert metrics["zero_shot_accuracy"] <= 0.25 and metrics["cider"] < 0.5


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size_does_not_matter(rows, batch_size):
    model, processor = KnowingModel(rows), KnowingProcessor()
    assert evaluate_model(model, processor, rows, batch_size) == evaluate_model(model, processor, rows, 5)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_restored(rows, training):
    model = KnowingModel(rows).train(training)
    evaluate_model(model, KnowingProcessor(), rows[:2])
    assert model.training is training
    with pytest.raises(KeyError):
        evaluate_model(model, KnowingProcessor(), [{"image": Image.new("RGB", (48, 48)), "text": "unknown"}] * 2)
    assert model.training is training


def test_missing_columns_are_not_measured(rows):
    model, processor = KnowingModel(rows), KnowingProcessor()
    only = lambda *names: [{name: row[name] for name in ("image", *names)} for row in rows]  # noqa: E731
    assert set(evaluate_model(model, processor, only("label"))) == {"zero_shot_accuracy"}
    assert set(evaluate_model(model, processor, only("long_caption"))) == {"long_text_to_image_recall@1"}
    regions = evaluate_model(model, processor, only("boxes", "region_captions"))
    assert set(regions) == {"region_recall@1", "region_caption_fidelity"}
    texts = [{"image": row["image"], "text": row["captions"][1]} for row in rows]
    metrics = evaluate_model(model, processor, texts)
    assert metrics["text_to_image_recall@1"] == metrics["caption_fidelity"] == 1


def test_rows_may_lack_captions_or_boxes(rows):
    mixed = [dict(row) for row in rows]
    mixed[0] |= {"captions": [], "boxes": [], "region_captions": []}
    mixed[-1] |= {"captions": None, "long_caption": None}
    samples = []
    metrics = evaluate_model(KnowingModel(rows), KnowingProcessor(), mixed, batch_size=4, samples=samples)
    assert metrics.pop("cider") > 1
    assert metrics == {name: 1 for name in metrics}
    assert samples[0] == {"caption": None, "region_captions": []}
    assert samples[1] == {"caption": rows[1]["captions"][-1], "region_captions": rows[1]["region_captions"]}


def test_a_text_of_several_images_is_right_for_each(rows):
    # The model finds the first of the two by the caption that is given to both.
    first, second = dict(rows[0]), dict(rows[1])
    second["captions"] = [first["captions"][0], *second["captions"]]
    metrics = evaluate_model(KnowingModel(rows), KnowingProcessor(), [first, second, *rows[2:]])
    assert metrics["text_to_image_recall@1"] == metrics["image_to_text_recall@1"] == 1


def test_every_caption_is_a_query_also_where_images_share_it(rows):
    shared = rows[0]["captions"][:1]
    wrong = rows[4]["captions"][:1]
    three = [dict(rows[0], captions=shared), dict(rows[1], captions=shared), dict(rows[3], captions=wrong)]
    assert evaluate_model(KnowingModel(rows), KnowingProcessor(), three)["text_to_image_recall@1"] == 2 / 3


def test_a_region_of_the_same_meaning_is_right(rows):
    texts = [text.replace(" ", " the ", 1) for text in rows[0]["region_captions"]]
    assert not set(texts) & set(rows[0]["region_captions"])
    doubled = [*rows, {**rows[0], "captions": None, "region_captions": texts}]  # what row 0 shows is there twice
    assert evaluate_model(KnowingModel(rows), KnowingProcessor(), doubled)["region_recall@1"] == 1


def test_with_a_real_model_the_batch_size_does_not_matter(tiny_model, tiny_processor, rows):
    one, other = [], []
    metrics = evaluate_model(tiny_model, tiny_processor, rows[:5], batch_size=2, max_new_tokens=4, samples=one)
    assert evaluate_model(tiny_model, tiny_processor, rows[:5], 5, max_new_tokens=4, samples=other) == metrics
    assert one == other and len(one) == 5
    assert metrics["caption_fidelity"] == metrics["region_caption_fidelity"] == 0  # it was never trained
    assert metrics["text_to_image_recall@5"] == 1  # of 5 images


def test_labels_of_other_data_choose_among_themselves(rows):
    class Model(KnowingModel):
        def _embed(self, text):
            return torch.tensor([1.0, 0.0]) if text == "a picture of cat" else torch.tensor([0.0, 1.0])

    labelled = [{"image": row["image"], "label": "cat" if number < 3 else "dog"} for number, row in enumerate(rows)]
    metrics = evaluate_model(Model(rows), KnowingProcessor(), labelled)
    assert metrics == {"zero_shot_accuracy": pytest.approx(1 - 3 / COUNT)}  # all images are embedded as a dog


def test_one_row_is_refused(rows):
    with pytest.raises(ValueError, match="dataset must have 2 rows or more, got 1"):
        evaluate_model(KnowingModel(rows), KnowingProcessor(), rows[:1])


def test_regions_without_their_boxes_are_refused(rows):
    odd = [*rows[:3], {**rows[3], "boxes": rows[3]["boxes"][1:]}]
    message = f"has {len(odd[3]['boxes'])} boxes and {len(odd[3]['region_captions'])} region_captions"
    with pytest.raises(ValueError, match=message):
        evaluate_model(KnowingModel(rows), KnowingProcessor(), odd)


def test_texts_are_batched_by_length_and_returned_in_order(rows):
    model, processor = KnowingModel(rows), KnowingProcessor()
    texts = [text for row in rows for text in (*row["captions"], row["long_caption"], "")]
    embeddings = embed_texts(model, processor, texts, batch_size=4)
    expected = torch.stack([torch.nn.functional.normalize(model._embed(text), dim=0) for text in texts])
    assert torch.equal(embeddings, expected)
    padding = sum((mask == 0).sum().item() for mask in model.text_batches)
    assert padding < 0.1 * sum(mask.numel() for mask in model.text_batches)
    with pytest.raises(ValueError, match="texts must not be empty"):
        embed_texts(model, processor, [])


def test_regions_come_without_padding(rows):
    boxes = [row["boxes"] for row in rows]
    embeddings = embed_regions(KnowingModel(rows), KnowingProcessor(), [row["image"] for row in rows], boxes)
    assert len(embeddings) == sum(map(len, boxes)) and torch.allclose(embeddings.norm(dim=-1), torch.tensor(1.0))
