"""The experiment in a setting of seconds: what the arms train, and what becomes of their results."""

import json
import math
from dataclasses import replace
from statistics import mean

import fresh_process
import pytest
import torch
import torch.nn.functional as F
from in_this_process import InThisProcess
from scipy import stats

from benchmarks import experiment, experiment_data, experiment_report, workers
from benchmarks.experiment import ARMS, SETTINGS, finished_runs, run_all
from benchmarks.experiment_data import prepare_batches, prepare_held_out, prepare_tokenizer, to_pixels
from benchmarks.experiment_report import differences_table, interval, results_table
from benchmarks.experiment_training import evaluate, fact_score, train
from benchmarks.peers import CLIPContestant, LlavaContestant, TowerSizes

pytestmark = pytest.mark.slow

MICRO = replace(
    SETTINGS["cpu"],
    towers=TowerSizes(image_size=48, patch_size=6, vision_layers=1, text_layers=1, width=32, heads=2, vocabulary=800),
    steps=4,
    batch_size=4,
    long_share=0.5,
    held_out=12,
    warmup=1,
    max_new_tokens=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def data(folder):
    """Tokenizer, held-out scenes and the batches of seed 0, where the experiment looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_data, "TOKENIZER_SCENES", 200)
        tokenizer = prepare_tokenizer(MICRO, folder / "data" / "tokenizer")
    held_out = prepare_held_out(MICRO, tokenizer, folder / "data" / "held-out.pt")
    return tokenizer, held_out, prepare_batches(MICRO, tokenizer, 0, folder / "data" / "seed-0.pt")


def build(name, data):
    tokenizer = data[0]
    torch.manual_seed(0)
    return ARMS[name].build(MICRO.towers, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<image>"))


def gradients(contestant, batch):
    sum(contestant.losses(to_pixels(batch)).values()).backward()
    return {name: parameter.grad for name, parameter in contestant.model.named_parameters()}


def is_zero(gradient):
    return gradient is None or not gradient.any()


def test_embedding_only_learns_nothing_from_captions(data):
    contestant = build("embedding-only", data)
    batch = data[2][0]
    found = gradients(contestant, batch)
    assert is_zero(found["token_projection.1.weight"])
    assert not is_zero(found["text_projection.weight"])
    # The tied vocabulary head would spread a caption's gradient over every token, used or not.
    unused = torch.ones(MICRO.towers.vocabulary, dtype=torch.bool)
    unused[batch["input_ids"].unique()] = False
    assert not found["language_model.model.embed_tokens.weight"][unused].any()


def test_captioning_only_learns_nothing_from_retrieval(data):
    found = gradients(build("captioning-only", data), data[2][0])
    for name in ("text_projection.weight", "image_projection.1.weight", "embedding_tokens", "logit_scale"):
        assert is_zero(found[name]), name
    assert not is_zero(found["token_projection.1.weight"])


def test_joint_is_the_sum_of_both(data):
    batch = data[2][0]
    joint = gradients(build("joint", data), batch)["vision_tower.pre_layrnorm.weight"]
    parts = [
        gradients(build(name, data), batch)["vision_tower.pre_layrnorm.weight"]
        for name in ("embedding-only", "captioning-only")
    ]
    torch.testing.assert_close(joint, parts[0] + parts[1], rtol=1e-4, atol=1e-6)


def test_without_attention_the_aggregator_stays_average_pooling(data):
    grid = torch.randn(2, MICRO.towers.width, 8, 8, generator=torch.Generator().manual_seed(0))
    average = F.adaptive_avg_pool2d(grid, 4).flatten(2).transpose(1, 2)
    for name, stays in (("average-pooling", True), ("joint", False)):
        contestant = build(name, data)
        train(contestant, data[2], MICRO)
        with torch.no_grad():
            tokens = contestant.model.pool_aggregator(grid)
        assert torch.allclose(tokens, average, atol=1e-6) == stays, name


def test_all_arms_read_the_same_batches_and_no_held_out_scene(data):
    _, held_out, batches = data
    ids = torch.cat([batch["image_ids"] for batch in batches])
    assert len(ids.unique()) == MICRO.steps * MICRO.batch_size
    assert not torch.isin(held_out.batch["image_ids"], ids).any()
    assert all(batch["pixel_values"].dtype == torch.uint8 for batch in batches)


def test_clip_reads_77_tokens_and_their_end(data):
    contestant = CLIPContestant(MICRO.towers, eos_token_id=0)
    input_ids = torch.arange(1, 101).repeat(2, 1)
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 3:], attention_mask[1, 3:] = 0, 0
    cut, mask = contestant.cut(input_ids, attention_mask)
    assert cut[0].tolist() == [*range(1, 77), 0] and mask[0].sum() == 77
    assert cut[1, :5].tolist() == [1, 2, 3, 0, 0] and mask[1].sum() == 4
    contestant.model.eval()
    changed = input_ids.clone()
    changed[0, 76:] = 5
    with torch.no_grad():
        before, after = (contestant.embed_texts(ids, attention_mask) for ids in (input_ids, changed))
    torch.testing.assert_close(before, after)  # what comes later is not seen


def test_llava_loss_is_that_of_transformers(data):
    tokenizer, held_out, _ = data
    contestant = LlavaContestant(MICRO.towers, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<image>"))
    batch = held_out.batch
    row = {name: tensor[:1] for name, tensor in batch.items()}
    text = row["input_ids"][row["attention_mask"].bool()].tolist() + [tokenizer.eos_token_id]
    prompt = len(contestant.prompt)
    outputs = contestant.model(
        input_ids=torch.tensor([contestant.prompt + text]),
        pixel_values=row["pixel_values"],
        labels=torch.tensor([[-100] * prompt + text]),
    )
    torch.testing.assert_close(contestant.losses(row)["caption_loss"], outputs.loss)
    assert torch.isfinite(contestant.losses(batch)["caption_loss"])


def test_same_caption_loss_for_both_captioners(data):
    """With a language model that looks at nothing, both must count the same tokens."""
    tokenizer, held_out, _ = data
    losses = []
    for name in ("captioning-only", "llava"):
        contestant = build(name, data)
        with torch.no_grad():
            contestant.model.get_output_embeddings().weight.zero_()
            losses.append(contestant.losses(held_out.batch)["caption_loss"].item())
    assert losses == pytest.approx([math.log(MICRO.towers.vocabulary)] * 2, rel=1e-5)


def test_perfect_embeddings_find_everything(data):
    tokenizer, held_out, _ = data
    contestant = build("embedding-only", data)
    scenes = len(held_out.captions)
    number_of = {
        tuple(tokenizer(text)["input_ids"]): number
        for number, texts in enumerate([*held_out.captions])
        for text in [*texts, held_out.long_captions[number]]
    }

    def embed_texts(input_ids, attention_mask):
        rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return F.one_hot(torch.tensor([number_of[row] for row in rows]), scenes).float()

    contestant.embed_images = lambda pixel_values: torch.eye(scenes)
    contestant.embed_texts = embed_texts
    metrics = evaluate(contestant, tokenizer, held_out, MICRO)
    assert metrics == {"text_to_image": 1.0, "image_to_text": 1.0, "long_text": 1.0}


def test_fact_score_counts_attributes():
    reference = "a red star at the top and a large striped blue moon on the left"
    assert fact_score([reference], [reference]) == 1.0
    assert fact_score(["a red heart at the top and a large striped blue moon on the left"], [reference]) == 7 / 8
    assert fact_score(["a red star at the top"], [reference]) == pytest.approx(2 * 4 / (4 + 8))
    assert fact_score(["red red star"], [reference]) == 0.0


def test_every_arm_is_run_once_and_a_stopped_experiment_goes_on(data, folder, monkeypatch):
    arms = {name: ARMS[name] for name in ("joint", "clip-77", "llava")}
    monkeypatch.setattr(experiment, "ARMS", arms)
    threads = torch.get_num_threads()
    with monkeypatch.context() as patch:
        patch.setattr(workers, "ProcessPoolExecutor", InThisProcess)
        first = run_all(MICRO, folder, workers=1, seeds=(0, 1))
    torch.set_num_threads(threads)
    assert {(result["arm"], result["seed"]) for result in first} == {(name, seed) for name in arms for seed in (0, 1)}
    assert set(first[0]["metrics"]) == set(experiment_report.METRICS)
    assert (folder / "plot.png").stat().st_size > 0

    path = folder / "clip-77-1.json"
    path.unlink()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*-*.json")}
    with monkeypatch.context() as patch:
        patch.setattr(workers.multiprocessing, "get_context", lambda method: fresh_process.context)
        again = run_all(MICRO, folder, workers=1, seeds=(0, 1))  # in a process of its own
    assert path.is_file()
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert [result["metrics"] for result in again] == [result["metrics"] for result in first]  # runs repeat
    table = (folder / "table.md").read_text()
    value = mean(json.loads((folder / f"joint-{seed}.json").read_text())["metrics"]["caption_nll"] for seed in (0, 1))
    assert f"{value:.3f} ±" in table

    with pytest.raises(ValueError, match="another setting"):
        finished_runs(folder, replace(MICRO, steps=5))


def results(**values):
    return [
        {"arm": arm, "seed": seed, "metrics": {"fidelity": value}, "trained_parameters": 10**6}
        for arm, column in values.items()
        for seed, value in enumerate(column)
    ]


def test_table_holds_means_and_deviations():
    table = results_table(results(joint=[0.1, 0.2, 0.3], llava=[0.5]), {"joint": "J", "llava": "L", "clip-77": "C"})
    rows = table.splitlines()[2:]
    assert len(rows) == 2
    assert "0.200 ± 0.100" in rows[0]
    assert "| 0.500 |" in rows[1]  # one seed has no deviation


def test_differences_are_paired_by_seed():
    joint, llava = [0.1, 0.2, 0.3], [0.0, 0.2, 0.1]
    expected = stats.ttest_rel(joint, llava).confidence_interval(0.95)
    row = next(
        row for row in differences_table(results(joint=joint, llava=llava)).splitlines() if "joint − llava" in row
    )
    middle, half = (expected.high + expected.low) / 2, (expected.high - expected.low) / 2
    assert f"{middle:+.3f} ± {half:.3f}" in row
    assert interval([1.0]) == math.inf
