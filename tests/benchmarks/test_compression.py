"""The compression experiment in a setting of seconds: what its stages train, and what becomes of its runs."""

import json
from dataclasses import replace

import pytest
import torch
from in_this_process import InThisProcess
from scipy import stats
from tiny_models import build_model

from benchmarks import compression, compression_data, workers
from benchmarks.compression import Run, StageTraining, all_runs, execute, finished_runs, recall, run_all
from benchmarks.compression_data import HeldOut, Setting, Stage, prepare_batches, prepare_held_out
from benchmarks.compression_report import report
from mmgem.training.scenes.dataset import SceneDataset


@pytest.fixture(scope="module")
def setting(tmp_path_factory, tiny_processor):
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    build_model().save_pretrained(checkpoint)
    tiny_processor.save_pretrained(checkpoint)
    return Setting(
        checkpoint=str(checkpoint),
        vectors=(1, 3),
        seeds=1,
        pairs=(4, 8),
        compress_images=6,
        held_out=5,
        compress=Stage(3, 1e-3, {"memory_captions_per_image": 1, "memory_questions_per_image": 1}),
        match=Stage(4, 1e-3, {"match_captions_per_image": 1}),
    )


@pytest.fixture(scope="module")
def batches(setting, tmp_path_factory):
    return prepare_batches(setting, 0, tmp_path_factory.mktemp("data") / "seed-0.pt")


def grid_model(setting, vectors=3):
    return compression.build_model(setting, Run(vectors, seed=0, compressed=True, pairs=0))


def test_grids_stand_for_the_images_they_were_made_of(setting, pixel_values):
    model, plain = grid_model(setting), build_model()
    plain.load_state_dict(model.state_dict() | {"embedding_tokens": model.embedding_tokens[:1]})
    plain.embedding_tokens = model.embedding_tokens
    ids = torch.ones(3, 4, dtype=torch.long)  # placeholders
    with torch.no_grad():
        grids = plain._patch_grid(pixel_values)
        found = model.get_multimodal_features(ids, pixel_values=grids).last_hidden_state
        expected = plain.get_multimodal_features(ids, pixel_values=pixel_values).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(grids.half(), compression_data._grids(plain, pixel_values))


def test_stages_read_other_scenes_than_are_measured_on(setting, batches, tmp_path, monkeypatch):
    drawn = []
    original = SceneDataset.__getitem__

    def getitem(self, row):
        drawn.append(frozenset(self.scene(row).objects))
        return original(self, row)

    monkeypatch.setattr(SceneDataset, "__getitem__", getitem)
    held_out = prepare_held_out(setting, tmp_path / "held-out.pt")
    measured = set(drawn)
    assert len(held_out.captions) == len(held_out.grids) == len(measured) == len(drawn) == setting.held_out
    drawn.clear()
    monkeypatch.setattr(
        compression_data, "TRAINING_SEED", compression_data.HELD_OUT_SEED
    )  # the same scenes come again
    prepare_batches(setting, 0, tmp_path / "seed-0.pt")
    assert len(drawn) == setting.compress_images + max(setting.pairs)
    assert measured.isdisjoint(drawn)
    assert max(map(len, [*measured, *drawn])) <= setting.max_objects
    assert [len(batches[name]) for name in ("compress", "match")] == [2, 2]


def gradients(setting, batch, stage):
    model = grid_model(setting)
    losses = StageTraining(model, compression.LOSSES[stage], learning_rate=0.0, warmup=0).losses(batch)
    sum(losses.values()).backward()
    return {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }


def test_compress_learns_from_texts_alone_and_match_from_pairs_alone(setting, batches):
    compress, match = (gradients(setting, batches[name][0], name) for name in ("compress", "match"))
    shared = {"embedding_tokens", "token_projection.1.weight", "pool_aggregator.output.weight"}
    assert shared <= compress & match
    assert match - compress >= {"text_projection.weight", "logit_scale"}
    assert not any(name.startswith("vision_tower") for name in compress | match)
    assert not any(name.startswith("image_projection") for name in compress | match)


def test_what_compress_writes_comes_through_the_emb_vectors(setting, batches):
    batch = batches["compress"][0]
    is_written = (batch["labels"] != -100).any(-1)
    assert (batch["memory_row"][is_written] >= 0).all() and not batch["contrastive_mask"].any()
    assert is_written.sum() == 2 * setting.compress.batch_size


def test_recall_counts_captions_whose_image_comes_first(setting, tiny_processor, monkeypatch):
    model = grid_model(setting)
    grids = torch.arange(3.0)[:, None, None, None].expand(3, 32, 4, 4).half()
    held_out = HeldOut(grids, [["a", "b"], ["c"], ["d"]])
    embeds = torch.eye(3)
    seen = []

    def features(input_ids, pixel_values):
        seen.append((input_ids == model.config.image_token_id).sum().item())
        return type("Output", (), {"pooler_output": 5 * embeds[pixel_values[:, 0, 0, 0].long()]})

    monkeypatch.setattr(model, "get_multimodal_features", features)
    monkeypatch.setattr(compression, "EVAL_BATCH", 2)
    monkeypatch.setattr(compression, "embed_texts", lambda model, processor, texts: embeds[[0, 1, 1, 2]])
    assert recall(model, tiny_processor, held_out) == 3 / 4  # "b" finds another image
    assert seen == [2 * tiny_processor.num_visual_tokens, tiny_processor.num_visual_tokens]


@pytest.mark.slow
def test_every_run_is_a_line_and_a_stopped_experiment_goes_on(setting, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(workers, "ProcessPoolExecutor", InThisProcess)
    executed = []
    monkeypatch.setattr(
        compression, "execute", lambda run, *arguments: executed.append(run) or execute(run, *arguments)
    )
    lines = run_all(setting, tmp_path, workers=1)
    torch.set_num_threads(threads)
    assert sorted(executed) == sorted(all_runs(setting)) and len(executed) == 2 * 2 * 3
    assert all(0 <= line["recall"] <= 1 for line in lines)
    assert [len(line["losses"]) for line in lines if line["compressed"] or line["pairs"]] == [1] * 10

    path = tmp_path / "runs.jsonl"
    written = path.read_text().splitlines(keepends=True)
    left = [Run(3, 0, True, 8), Run(1, 0, True, 0), Run(1, 0, True, 4)]
    (tmp_path / "data" / "compressed-3-0.pt").unlink()
    kept = [line for line in written[1:] if Run(*(json.loads(line)[name] for name in Run._fields)) not in left]
    path.write_text("".join([written[0], *kept, '{"vectors": 3, "se']))
    executed.clear()
    again = run_all(setting, tmp_path, workers=1)
    torch.set_num_threads(threads)
    assert sorted(executed) == sorted([*left, Run(3, 0, True, 0)])  # whose weights are needed again
    assert executed.index(Run(1, 0, True, 0)) < executed.index(Run(1, 0, True, 4))
    assert again == lines  # runs repeat
    assert len(path.read_text().splitlines()) == len(written) + 1
    assert report(again).count("\n| 3 |") == 3

    with pytest.raises(ValueError, match="another setting"):
        finished_runs(tmp_path, replace(setting, held_out=6), Run)


@pytest.mark.slow
def test_the_compress_stage_is_what_compressed_runs_start_from(setting, tmp_path):
    for compressed in (True, False):
        execute(Run(3, 0, compressed, 0), setting, tmp_path)
    weights = torch.load(tmp_path / "data" / "compressed-3-0.pt")
    start = grid_model(setting).state_dict()
    assert not torch.equal(weights["embedding_tokens"], start["embedding_tokens"])
    frozen = [name for name in start if name.startswith("vision_tower")]
    assert frozen and all(torch.equal(weights[name], start[name]) for name in frozen)
    with_stage, without = (execute(Run(3, 0, compressed, 4), setting, tmp_path) for compressed in (True, False))
    assert with_stage["losses"] != without["losses"]
    (tmp_path / "data" / "compressed-3-0.pt").unlink()
    torch.save(start, tmp_path / "data" / "compressed-3-0.pt")
    assert execute(Run(3, 0, True, 4), setting, tmp_path)["losses"] == without["losses"]


def test_a_checkpoint_with_several_emb_vectors_is_refused(setting, tmp_path):
    build_model(num_embedding_tokens=2).save_pretrained(tmp_path / "several")
    with pytest.raises(ValueError, match="with 2 \\[EMB\\] vectors"):
        run_all(replace(setting, checkpoint=str(tmp_path / "several")), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_numbers_of_images_are_whole_batches(setting):
    with pytest.raises(ValueError, match="`pairs` has 6; expected multiples of the batch size 4"):
        replace(setting, pairs=(4, 6))
    with pytest.raises(ValueError, match="compress_images"):
        replace(setting, compress_images=0)


def test_differences_are_paired_by_seed():
    without, compressed = [0.1, 0.3, 0.2], [0.2, 0.35, 0.15]
    lines = [
        {"vectors": 4, "pairs": 256, "compressed": with_stage, "seed": seed, "recall": value}
        for with_stage, values in ((False, without), (True, compressed))
        for seed, value in enumerate(values)
    ]
    expected = stats.ttest_rel(compressed, without).confidence_interval(0.95)
    middle, half = (expected.high + expected.low) / 2, (expected.high - expected.low) / 2
    row = [cell.strip() for cell in report(lines[::-1]).splitlines()[-1].strip("|").split("|")]
    assert row[:2] == ["4", "256"] and row[5:] == ["3", "2"]
    assert row[2].startswith("0.200 ±") and row[3].startswith("0.233 ±")
    assert row[4] == f"{middle:+.3f} ± {half:.3f}"
    assert "±" not in report([line for line in lines if line["seed"] == 0])
