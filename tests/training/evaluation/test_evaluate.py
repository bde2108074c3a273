"""The evaluation against a model that knows everything, one that knows nothing, and outputs made by hand."""

import re
import sys
from contextlib import nullcontext
from functools import partial

import fresh_process
import pytest
import torch
from encoders import picture as noise
from knowing_model import IgnorantModel, KnowingModel, KnowingProcessor, knowable_rows
from PIL import Image
from tiny_models import build_model
from transformers import CLIPImageProcessorPil

from mmgem.late_interaction import similarity
from mmgem.processing.processing_mmgem import MMGEMProcessor
from mmgem.processing.token_batches import TOKENS_ON_CPU
from mmgem.training.data.skipped import SkippedLog
from mmgem.training.evaluation import evaluate as evaluate_module
from mmgem.training.evaluation.calibration import calibrate
from mmgem.training.evaluation.evaluate import (
    _edit_figures,
    _instruction_figures,
    _pointing_figures,
    _region_figures,
)
from mmgem.training.evaluation.row_outputs import RowOutputs, RowPredictor
from mmgem.training.evaluation.scene_metrics import SCENE_JUDGE
from mmgem.training.inference import embed_texts
from mmgem.training.similarity_maps import similarity_map

evaluate_model = partial(evaluate_module.evaluate_model, caption_judge=SCENE_JUDGE)
COUNT = 12
NAN = float("nan")
PER_ROW = ("caption_fidelity", "memory_caption_fidelity", "answer_accuracy", "memory_answer_accuracy")
NEW = ("fused_text_to_image_recall@1", "instructed_region_accuracy", "composed_recall@1")
WORDING = (
    "answer_prior_accuracy",
    "pointing_center_accuracy",
    "bleu4",
    "caption_distinct",
    "caption_most_repeated",
    "caption_length",
)


def without_wording(metrics):
    """Figures without those of the data and of wording, which no model has at 1 because it knows everything."""
    assert metrics["cider"] > 1 and metrics["bleu4"] > 0.5 and metrics["caption_length"] > 3
    return {name: value for name, value in metrics.items() if name not in (*WORDING, "cider")}


@pytest.fixture(scope="module")
def rows():
    return knowable_rows(COUNT)


def test_a_model_that_knows_everything_scores_one(rows):
    metrics = evaluate_model(KnowingModel(rows), KnowingProcessor(), rows, batch_size=5)
    names = {f"{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    names |= {"long_text_to_image_recall@1", "zero_shot_accuracy", "caption_fidelity", "cider"}
    names |= {"region_recall@1", "region_in_image_recall@1", "region_caption_fidelity", "pointing_accuracy"}
    names |= {*PER_ROW, *NEW, *WORDING}
    assert set(metrics) == names
    assert without_wording(metrics) == {name: 1 for name in names - {*WORDING, "cider"}}


def test_a_model_that_knows_nothing_scores_zero(rows):
    metrics = evaluate_model(IgnorantModel(rows), KnowingProcessor(), rows, batch_size=5)
    for name in (
        "text_to_image_recall@1",
        "text_to_image_recall@10",
        "long_text_to_image_recall@1",
        "region_recall@1",
        "region_caption_fidelity",
        "pointing_accuracy",
        *PER_ROW,
        *NEW,
    ):
        assert metrics[name] == 0
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
    pointing = {"pointing_accuracy", "pointing_center_accuracy"}
    assert set(regions) == {"region_recall@1", "region_in_image_recall@1", "region_caption_fidelity", *pointing}
    assert set(evaluate_model(model, processor, only("boxes", "instructions"))) == {"instructed_region_accuracy"}
    assert set(evaluate_model(model, processor, only("edit", "edited_image"))) == {"composed_recall@1"}
    answers = evaluate_model(model, processor, only("qa"))
    assert set(answers) == {"answer_accuracy", "memory_answer_accuracy", "answer_prior_accuracy"}
    texts = [{"image": row["image"], "text": row["captions"][1]} for row in rows]
    metrics = evaluate_model(model, processor, texts)
    assert metrics["text_to_image_recall@1"] == metrics["caption_fidelity"] == 1


def test_a_judge_that_does_not_fit_the_captions_leaves_nothing_behind(rows):
    # One phrase of each row can be read, as "a red ball" of a photograph can.
    others = [
        {"image": row["image"], "boxes": row["boxes"], "captions": [f"someone looks at thing {number}"]}
        | {"region_captions": [row["region_captions"][0], *["a hat"] * (len(row["boxes"]) - 1)]}
        for number, row in enumerate(rows)
    ]
    figures = evaluate_model(KnowingModel(rows), KnowingProcessor(), others)
    assert "region_recall@1" in figures and not [name for name in figures if name.endswith("_fidelity")]


def test_rows_may_lack_captions_or_boxes(rows):
    mixed = [dict(row) for row in rows]
    mixed[0] |= {"captions": [], "boxes": [], "region_captions": [], "instructions": []}
    mixed[-1] |= {"captions": None, "long_caption": None, "qa": None, "edit": None, "instructions": None}
    mixed[1]["edit"] = {"instruction": None, "file_name": None}  # as image folders have it
    samples = []
    metrics = evaluate_model(KnowingModel(rows), KnowingProcessor(), mixed, batch_size=4, samples=samples)
    metrics = without_wording(metrics)
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


def test_images_find_texts_by_the_logits_of_the_model(tiny_processor):
    """MaxSim is not the same both ways."""
    model = build_model(num_embedding_tokens=3, embedding_pooling="multi_vector")
    torch.manual_seed(0)
    torch.nn.init.normal_(model.embedding_tokens)
    pictures = [noise(seed) for seed in range(30)]
    texts = [f"{'a star ' * number}and {number} circles" for number in range(30)]
    figures = evaluate_model(
        model,
        tiny_processor,
        [{"image": picture, "caption": text} for picture, text in zip(pictures, texts, strict=True)],
        max_new_tokens=1,
    )
    with torch.no_grad():
        outputs = model(**tiny_processor(images=pictures, text=texts, padding=True, return_tensors="pt"))
    images, asked = outputs.image_embeds, outputs.text_embeds
    assert not torch.equal(similarity(images, asked).argmax(1), outputs.logits_per_image.argmax(1))
    for k in (1, 5, 10):
        ranks = (outputs.logits_per_image > outputs.logits_per_image.diagonal()[:, None]).sum(1)
        assert figures[f"image_to_text_recall@{k}"] == pytest.approx((ranks < k).double().mean().item())


MODELS = {
    "single": {},
    "mean": {"num_embedding_tokens": 3, "embedding_pooling": "mean", "prompts": {"edit": "with this change: "}},
    "multi_vector": {"num_embedding_tokens": 3, "embedding_pooling": "multi_vector"},
    "prompt": {"embedding_prompt_ids": [5, 6]},
}


@pytest.mark.parametrize("kind", MODELS)
def test_with_a_real_model_the_batch_size_does_not_matter(kind, tiny_processor, rows):
    model = build_model(**MODELS[kind])
    one, other = [], []
    metrics = evaluate_model(model, tiny_processor, rows[:5], batch_size=2, max_new_tokens=4, samples=one)
    assert evaluate_model(model, tiny_processor, rows[:5], 5, max_new_tokens=4, samples=other) == metrics
    assert one == other and len(one) == 5
    assert metrics["caption_fidelity"] == metrics["region_caption_fidelity"] == 0  # it was never trained
    assert metrics["text_to_image_recall@5"] == 1  # of 5 images
    assert {"composed_recall@1", "instructed_region_accuracy", "answer_accuracy"} <= set(metrics)
    in_memory = {name for name in metrics if name.startswith(("memory", "fused"))}
    assert len(in_memory) == (0 if kind == "prompt" else 3)


def test_labels_of_other_data_choose_among_themselves(rows):
    class Model(KnowingModel):
        def _embed(self, text):
            return torch.tensor([1.0, 0.0]) if text == "a picture of cat" else torch.tensor([0.0, 1.0])

    labelled = [{"image": row["image"], "label": "cat" if number < 3 else "dog"} for number, row in enumerate(rows)]
    metrics = evaluate_model(Model(rows), KnowingProcessor(), labelled)
    assert metrics == {"zero_shot_accuracy": pytest.approx(1 - 3 / COUNT)}  # all images are embedded as a dog


def test_without_a_judge_there_is_no_fidelity_and_nothing_else_changes(rows):
    model, processor = KnowingModel(rows), KnowingProcessor()
    judged = evaluate_model(model, processor, rows)
    written = dict(model.calls)["recall"]
    plain = evaluate_module.evaluate_model(model, processor, [row | {"label": None} for row in rows])
    fidelity = {"caption_fidelity", "memory_caption_fidelity", "region_caption_fidelity"}
    assert judged.keys() - plain.keys() == fidelity | {"zero_shot_accuracy"}
    assert plain == {name: judged[name] for name in plain}
    assert written > 0


def test_the_judge_leaves_other_data_alone(rows):
    class Model(KnowingModel):
        def _embed(self, text):
            return torch.tensor([1.0, len(text)])

    cats = [{"image": row["image"], "text": f"a cat on {n} sofas", "label": "cat"} for n, row in enumerate(rows)]
    figures = evaluate_model(Model(rows), KnowingProcessor(), cats)
    assert figures == evaluate_module.evaluate_model(Model(rows), KnowingProcessor(), cats)
    assert "zero_shot_accuracy" in figures and not any("fidelity" in name for name in figures)


def test_cider_is_left_out_where_what_it_needs_is_missing(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    figures = evaluate_model(KnowingModel(rows), KnowingProcessor(), rows)
    assert not {"cider", "bleu4"} & figures.keys() and figures["answer_accuracy"] == 1


def test_captions_of_each_language_are_measured(rows):
    other = [row | {"captions_xx": row["captions"]} for row in rows]
    other[2]["captions_xx"] = rows[1]["captions"]  # two images at once cannot be found by one embedding
    other[3]["captions_yy"] = None
    figures, intervals = {}, {}
    figures = evaluate_model(KnowingModel(rows), KnowingProcessor(), other, intervals=intervals)
    assert figures["text_to_image_recall@1"] == 1 and figures["text_to_image_recall@1_xx"] == 1
    assert figures["image_to_text_recall@10_xx"] < 1
    assert not any(name.endswith("_yy") for name in figures)
    assert intervals["text_to_image_recall@1"] == (1, 1) and intervals["image_to_text_recall@10_xx"][0] < 1
    low, high = intervals["cider"]
    assert low < figures["cider"] < high
    assert intervals["answer_accuracy"] == intervals["memory_answer_accuracy"] == (1, 1)
    assert intervals.keys() <= figures.keys() and "bleu4" not in intervals


def test_a_region_searches_those_of_its_own_image():
    """Four boxes in two images, of which the first has one twice, and a text that finds the wrong image's box."""
    boxes = [[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]], [[0, 0, 1, 1]]]
    texts, embeds = [["a", "b", "c"], ["d"]], torch.eye(4)
    regions = embeds[[0, 0, 1]], embeds[2:3]
    said = torch.stack([embeds[0], embeds[0], 0.1 * embeds[1] + embeds[2]]), embeds[3:]
    outputs = [
        RowOutputs(
            {"boxes": own, "region_captions": own_texts}, embeds[0], region_embeds=part, region_text_embeds=queries
        )
        for own, own_texts, part, queries in zip(boxes, texts, regions, said, strict=True)
    ]
    figures = _region_figures(outputs, None)
    assert float(figures["region_recall@1"]) == 2 / 4  # "c" finds the box of "d", and "d" nothing
    assert float(figures["region_in_image_recall@1"]) == 1  # of "a", "b" and "c"


def test_a_meaning_points_once_in_its_image_at_any_of_its_boxes():
    """Two boxes of a dog, of which the second is hit, a cat that is missed, and an image without boxes."""
    boxes, points = [[0, 0, 2, 2], [6, 6, 9, 9], [0, 4, 4, 8]], torch.tensor([[7.0, 9.0], [7.0, 9.0], [4.5, 5.0]])
    row = {"boxes": boxes, "region_captions": ["a dog", "A dog", "a cat"]}
    outputs = [
        RowOutputs({}, torch.zeros(2)),
        RowOutputs(row, torch.zeros(2), region_points=points, center=(2.0, 5.0)),
    ]
    figures = {name: value.values.tolist() for name, value in _pointing_figures(outputs, None).items()}
    assert figures == {"pointing_accuracy": [True, False], "pointing_center_accuracy": [False, True]}
    assert _pointing_figures(outputs[:1], None) == {}


def test_captions_of_regions_point_where_their_similarity_map_is_largest(rows, tiny_processor):
    model = build_model()
    for output, row in zip(RowPredictor(model, tiny_processor, 2, 2).predict(rows[:3]), rows, strict=False):
        queries = embed_texts(model, tiny_processor, row["region_captions"])
        torch.testing.assert_close(output.region_text_embeds, queries)
        peaks = similarity_map(model, tiny_processor, row["image"], queries).peaks()
        assert torch.equal(output.region_points, peaks) and output.center == (24, 24)


@pytest.mark.slow
def test_general_code_imports_no_scenes(tmp_path):
    program = """
import sys
import mmgem.training.evaluation.evaluate, mmgem.training.trainer, mmgem.training.search.index
import mmgem.training.evaluation.calibration, mmgem.training.captioning
print([name for name in sys.modules if name.startswith("mmgem.training.scenes")])
"""
    assert fresh_process.run(program, cwd=tmp_path, installed=True).strip() == "[]"


def test_one_row_is_refused(rows):
    with pytest.raises(ValueError, match="`dataset` has 1 rows that can be read; expected 2 or more"):
        evaluate_model(KnowingModel(rows), KnowingProcessor(), rows[:1])


PICTURE = Image.new("RGB", (8, 8))
BOXED = {"image": PICTURE, "boxes": [[0, 0, 4, 4]], "region_captions": ["a star"]}
UNMEASURABLE = [
    ({"images": [PICTURE] * 2, "caption": "a"}, "row 1 has 2 images; expected one"),
    ({"qa": [{"question": "what?", "answer": "that"}]}, "row 1 has 0 images; expected one"),
    ({"image": PICTURE, "qa": [{"question": "what?"}]}, "in `qa`; expected a `question` and an `answer`"),
    ({"image": PICTURE, "qa": [{"question": 3, "answer": "four"}]}, "row 1 has `qa` 3; expected text"),
    ({"image": PICTURE, "qa": {"question": "a", "answer": "b"}}, "row 1 has `qa` {.*}; expected a list"),
    ({"image": PICTURE, "qa": True, "file_name": "a.png"}, r"row 1 \('a.png'\) has `qa` True; expected a list"),
    ({"image": PICTURE, "captions": {"en": "a star"}}, "has `captions` {.*}; expected text, in a list"),
    ({"image": PICTURE, "captions": ["a", NAN]}, "has `captions` nan; expected text"),
    ({"image": PICTURE, "captions_de": "ein Stern"}, "has `captions_de` 'ein Stern'; expected text, in a list"),
    ({"image": PICTURE, "captions_de": [3]}, "has `captions_de` 3; expected text"),
    ({"image": PICTURE, "long_caption": ["a"]}, r"has `long_caption` \['a'\]; expected text"),
    ({"image": PICTURE, "queries": 5}, "has `queries` 5; expected text, in a list"),
    ({"image": PICTURE, "label": ["a"]}, r"has `label` \['a'\]; expected a text or a number"),
    ({"image": PICTURE, "label": NAN}, "has `label` nan; expected a text or a number"),
    ({"image": PICTURE, "image_id": NAN}, "has `image_id` nan; expected a text or a number"),
    ({"images": "ab.png"}, "has `images` 'ab.png'; expected a list"),
    (BOXED | {"boxes": []}, "has 0 `boxes` and 1 `region_captions`; expected as many of each"),
    (BOXED | {"boxes": 5}, "has `boxes` 5; expected a list"),
    (BOXED | {"boxes": [0, 0, 4, 4]}, "has 0 in `boxes`; expected lists of"),
    (BOXED | {"boxes": [["0", "0", "4", "4"]]}, r"has \['0', '0', '4', '4'\] in `boxes`; expected lists of"),
    (BOXED | {"boxes": [[True, 0, 4, 4]]}, r"has \[True, 0, 4, 4\] in `boxes`; expected lists of"),
    (BOXED | {"boxes": [[0, 0, 10**400, 4]]}, "in `boxes`; expected lists of"),
    (BOXED | {"region_captions": "a"}, "has `region_captions` 'a'; expected text, in a list"),
    (BOXED | {"instructions": {"text": "it", "box": 0}}, "has `instructions` {.*}; expected a list"),
    (BOXED | {"instructions": [{"text": "it", "box": -1}]}, "in `instructions` and 1 `boxes`; expected a `text` and"),
    (BOXED | {"instructions": [{"text": "it", "box": 1}]}, "in `instructions` and 1 `boxes`; expected a `text` and"),
    (BOXED | {"instructions": [{"text": "it", "box": True}]}, "in `instructions` and 1 `boxes`; expected a `text`"),
    (BOXED | {"instructions": [{"text": 5, "box": 0}]}, "has `instructions` 5; expected text"),
    ({"image": PICTURE, "edit": "make it red", "edited_image": PICTURE}, "has `edit` 'make it red'; expected a map"),
]


@pytest.mark.parametrize(("row", "message"), UNMEASURABLE, ids=[message for _, message in UNMEASURABLE])
def test_a_row_that_cannot_be_measured_costs_itself_and_is_named(rows, row, message, caplog):
    model, skipped = KnowingModel(rows), SkippedLog()
    figures = evaluate_model(model, KnowingProcessor(), [rows[0], row, *rows[1:3]], skipped=skipped)
    assert skipped.counts() == {"rows": 1} and re.search(message, caplog.text)
    assert figures == evaluate_model(model, KnowingProcessor(), rows[:3])


def test_labels_may_be_of_several_types(rows):
    class Model(KnowingModel):
        def _embed(self, text):
            return torch.tensor([1.0, 0.0]) if text == "a picture of 7" else torch.tensor([0.0, 1.0])

    labelled = [{"image": row["image"], "label": label} for row, label in zip(rows, (7, "dog", "dog"), strict=False)]
    metrics = evaluate_model(Model(rows), KnowingProcessor(), labelled)
    assert metrics == {"zero_shot_accuracy": pytest.approx(2 / 3)}  # all images are embedded as a dog


def test_boxes_that_are_cropped_away_are_not_measured(tiny_processor):
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = MMGEMProcessor(image_processor, tiny_processor.tokenizer, num_visual_tokens=4)
    picture = Image.effect_noise((96, 32), 90).convert("RGB")
    seen, hidden = [40, 4, 60, 28], [0, 0, 20, 20]
    row = {
        "image": picture,
        "boxes": [hidden, seen, [34, 0, 50, 30]],
        "region_captions": ["hidden", "seen", "also seen"],
        "instructions": [{"text": "left", "box": 0}, {"text": "right", "box": 1}],
    }
    [outputs] = RowPredictor(build_model(), processor, 4, 4).predict([row])
    assert outputs.region_embeds.shape[0] == len(outputs.region_points) == 2 and len(outputs.region_captions) == 2
    assert outputs.row["region_captions"] == ["seen", "also seen"]
    assert outputs.row["instructions"] == [{"text": "right", "box": 0}] and len(outputs.instruction_embeds) == 1


def test_a_model_that_is_calibrated_for_images_and_texts_is_measured_on_those(tiny_processor, rows):
    model = build_model()
    apart = [{"image": row["image"]} for row in rows] + [{"captions": row["captions"]} for row in rows]
    calibrate(model, tiny_processor, apart)
    figures = evaluate_model(model, tiny_processor, rows[:5], max_new_tokens=4)
    assert {"text_to_image_recall@1", "memory_answer_accuracy", "region_recall@1"} <= set(figures)
    assert not {"fused_text_to_image_recall@1", "composed_recall@1", "instructed_region_accuracy"} & set(figures)


# ------------------------------------------------------------------------------------ the language model and its cost


def test_columns_that_are_not_there_cost_nothing(rows):
    model, processor = KnowingModel(rows), KnowingProcessor()
    evaluate_model(model, processor, [{"image": row["image"], "label": row["label"]} for row in rows], batch_size=5)
    assert {name for name, _ in model.calls} == {"get_image_features", "get_text_features"}
    assert sum(count for name, count in model.calls if name == "get_image_features") == COUNT


def test_captions_from_memory_are_only_written_where_they_can_be_judged(rows):
    class Model(KnowingModel):
        def _embed(self, text):
            return torch.tensor([1.0, len(text)])

    model = Model(rows)
    cats = [{"image": row["image"], "text": "a cat on a sofa"} for row in rows]
    assert "memory_caption_fidelity" not in evaluate_model(model, KnowingProcessor(), cats)
    assert "recall" not in dict(model.calls)
    scenes = [{"image": row["image"], "captions": row["captions"]} for row in rows[2:5]]
    evaluate_model(model, KnowingProcessor(), [*cats[:2], *scenes])
    assert dict(model.calls)["recall"] == 3


def test_captions_of_boxes_are_only_written_where_they_can_be_judged_or_are_asked_for(rows):
    cats = [{name: row[name] for name in ("image", "boxes", "region_captions")} for row in rows]
    model = KnowingModel(rows)
    figures = evaluate_module.evaluate_model(model, KnowingProcessor(), cats)
    assert figures["region_recall@1"] == 1 and "describe regions" not in dict(model.calls)
    samples = []
    evaluate_module.evaluate_model(model, KnowingProcessor(), cats, samples=samples)
    assert samples[0]["region_captions"] == rows[0]["region_captions"]


def test_the_vision_tower_runs_once_for_each_image(rows, tiny_processor):
    model, seen = build_model(), []
    model.vision_tower.register_forward_pre_hook(lambda module, inputs, kwargs: seen.append(inputs), with_kwargs=True)
    twice = [*rows[:3], rows[0]]
    figures = evaluate_model(model, tiny_processor, twice, max_new_tokens=2)
    pictures = [row.get(name) for row in twice for name in ("image", "edited_image")]
    different = {picture.tobytes() for picture in pictures if picture is not None}
    assert 3 < len(different) == sum(len(inputs[0]) for inputs in seen)
    assert "_patch_grid" not in vars(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmgem.training.evaluation.row_outputs.tower_runs_once", lambda model: nullcontext())
        expected = evaluate_model(model, tiny_processor, twice, max_new_tokens=2)
    assert figures == pytest.approx(expected)


def test_no_batch_is_larger_than_it_may_be(rows):
    model = KnowingModel(rows)
    evaluate_model(model, KnowingProcessor(), rows, batch_size=3)
    counts = {name: [count for method, count in model.calls if method == name] for name in dict(model.calls)}
    counts.pop("describe regions")  # of three images
    counts.pop("get_text_features")
    assert max(mask.numel() for mask in model.text_batches if len(mask) > 1) <= TOKENS_ON_CPU
    assert max(map(max, counts.values())) == 3
    questions = sum(len(row["qa"]) for row in rows)
    assert sum(counts["recall"]) == sum(counts["generate"]) == COUNT + questions  # a caption and the answers, once
    instructions, edits = sum(len(row["instructions"]) for row in rows), sum(row["edit"] is not None for row in rows)
    assert min(len(row["boxes"]) for row in rows) == 1  # whose instruction is not measured
    instructions -= sum(len(row["boxes"]) == 1 for row in rows)
    assert sum(counts["get_multimodal_features"]) == COUNT + instructions + edits  # one pass for vectors and memory


@pytest.mark.parametrize("prompts", [None, {}, {"object": "which? ", "edit": "so: ", "query": "find: "}])
def test_instructions_stand_behind_the_prompts_there_are(rows, prompts):
    model = KnowingModel(rows)
    model.config.prompts = prompts  # by which the model knows the texts; others it refuses
    metrics = evaluate_model(model, KnowingProcessor(), rows)
    assert metrics["composed_recall@1"] == metrics["instructed_region_accuracy"] == 1


def test_a_model_that_ignores_the_edit_finds_its_own_image(rows):
    class Model(KnowingModel):
        def _embed_fused(self, row, text):
            return super()._embed_fused(row, "")

    metrics = evaluate_model(Model(rows), KnowingProcessor(), rows)
    assert metrics["composed_recall@1"] == 0
    assert metrics["fused_text_to_image_recall@1"] == 1


# ------------------------------------------------------------------------------------------------ -outputs by hand


def _outputs(image_embed, twin=None, edit=None, name=None, twin_name=None):
    row = {"file_name": name, "edit": edit and {"instruction": "turn", "file_name": twin_name}}
    embeds = [None if embed is None else torch.tensor(embed) for embed in (image_embed, edit, twin)]
    return RowOutputs(row, embeds[0], edit_embed=embeds[1], twin_embed=embeds[2])


EDITED = ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.3, 0.9, 0.0])  # image, twin, image with instruction


@pytest.mark.parametrize(
    ("other", "recall"),
    [
        (_outputs([0.0, 0.0, 1.0]), 1),
        (_outputs([0.3, 0.95, 0.0]), 0),  # an image without an edit is nearer than the twin
        (_outputs([0.0, 0.0, 1.0], [0.3, 0.95, 0.0], [0.3, 0.95, 0.0]), 0.5),  # the twin of another is; it finds it
    ],
)
def test_an_edit_searches_all_images_and_all_twins(other, recall):
    assert _edit_figures([_outputs(*EDITED), other]) == {"composed_recall@1": recall}


def test_the_edited_image_itself_is_a_distractor():
    nearer = _outputs([0.3, 0.95, 0.0], *EDITED[1:])
    assert _edit_figures([nearer, _outputs([0.0, 0.0, 1.0])]) == {"composed_recall@1": 0}


def test_an_edited_image_that_is_a_row_too_is_right_there_as_well():
    edited = _outputs(*EDITED, name="a.png", twin_name="b.png")
    assert _edit_figures([edited, _outputs(EDITED[1], name="b.png")]) == {"composed_recall@1": 1}
    assert _edit_figures([edited, _outputs(EDITED[1], name="c.png")]) == {"composed_recall@1": 0}
    twice = [edited, _outputs([0.0, 0.0, 1.0], *EDITED[1:], twin_name="b.png")]
    assert _edit_figures(twice) == {"composed_recall@1": 1}
    nameless = [_outputs(*EDITED), _outputs(EDITED[1])]
    assert _edit_figures(nameless) == {"composed_recall@1": 0}


def test_an_instruction_searches_the_regions_of_its_own_image():
    def outputs(regions, instructions, boxes):
        row = {"boxes": [[0, 0, 1, 1]] * len(regions), "instructions": [{"text": "it", "box": box} for box in boxes]}
        return RowOutputs(row, torch.zeros(2), region_embeds=torch.tensor(regions), instruction_embeds=instructions)

    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    both = torch.cat([right, wrong])
    regions = [[0.6, 0.0], [0.0, 0.6]]
    decoy = outputs([[1.0, 0.0], [0.0, 1.0]], None, [])  # of another image, and nearer
    assert _instruction_figures([outputs(regions, right, [0]), decoy]) == {"instructed_region_accuracy": 1}
    assert _instruction_figures([outputs(regions, wrong, [0]), decoy]) == {"instructed_region_accuracy": 0}
    several = [outputs(regions, both, [0, 1]), outputs(regions, right, [1])]
    assert _instruction_figures(several) == {"instructed_region_accuracy": pytest.approx(2 / 3)}
    same = [outputs([[1.0, 0.0], [1.0, 0.0]], right, [0])]
    assert _instruction_figures(same) == {"instructed_region_accuracy": 0}
    assert _instruction_figures([decoy]) == {}


def test_an_instruction_of_the_only_box_does_not_count(rows):
    alone = [row | {"boxes": row["boxes"][:1], "region_captions": row["region_captions"][:1]} for row in rows]
    for row in alone:
        row["instructions"] = [{"text": "number 0", "box": 0}]
    columns = [{name: row[name] for name in ("image", "boxes", "instructions")} for row in alone]
    assert evaluate_model(KnowingModel(alone), KnowingProcessor(), columns) == {}
