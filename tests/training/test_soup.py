import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from transformers import AutoProcessor

from mmgem.processing.sentence_transformers_export import save_sentence_transformer
from mmgem.training.loading import load_checkpoint
from mmgem.training.soup import _average, soup
from mmgem.training.trainer.lora import add_lora


def variant(number: int, vision="siglip", text="llama", **config):
    """Models of one shape; the weights of each are random."""
    model = build_model(vision, text, prompts={"query": "find: "}, **config)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(folder, model, processor) -> str:
    save_sentence_transformer(model, processor, folder)
    return str(folder)


@pytest.fixture
def two(tiny_processor, tmp_path) -> list[str]:
    return [saved(tmp_path / str(number), variant(number), tiny_processor) for number in (1, 2)]


def edit_weights(folder: str, change):
    tensors = load_file(f"{folder}/model.safetensors")
    change(tensors)
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("vision", "text"), [("siglip", "llama"), ("dinov2", "gpt2"), ("dinov3", "qwen3"), ("vit", "gemma3")]
)
@pytest.mark.parametrize(("weights", "shares"), [(None, (0.5, 0.5)), ((3, 1), (0.75, 0.25)), ((0, 2), (0, 1))])
def test_weights_are_the_weighted_mean(vision, text, weights, shares, tiny_processor, tmp_path):
    models = [variant(number, vision, text) for number in (1, 2)]
    folders = [saved(tmp_path / str(number), model, tiny_processor) for number, model in enumerate(models)]
    assert soup(folders, tmp_path / "soup", weights) == dict(zip(folders, shares, strict=True))
    actual = load_checkpoint(tmp_path / "soup")[0].state_dict()
    first, second = (model.state_dict() for model in models)
    for name, parameter in actual.items():
        torch.testing.assert_close(parameter.cpu(), shares[0] * first[name] + shares[1] * second[name])


def test_soup_is_a_complete_folder(two, tiny_processor, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name, *args, **kwargs: asked.append(name))
    soup(two, tmp_path / "soup")
    assert not asked  # such as for that of a repository "None" on the Hub
    names = {path.name for path in (tmp_path / "soup").iterdir()}
    assert names == {path.name for path in (tmp_path / "1").iterdir()} | {"soup.json"}
    assert json.loads((tmp_path / "soup" / "soup.json").read_text()) == dict.fromkeys(two, 0.5)
    settings = json.loads((tmp_path / "soup" / "config_sentence_transformers.json").read_text())
    assert settings["prompts"]["query"] == "find: "
    model, processor = load_checkpoint(tmp_path / "soup")
    assert model.get_input_embeddings().weight is model.language_model.lm_head.weight  # tied, and in one file
    assert processor(text="a red star").input_ids == tiny_processor(text="a red star").input_ids


def test_soup_of_one_model_is_that_model(two, tiny_processor, pixel_values, text_batch, tmp_path):
    same = [two[0], saved(tmp_path / "copy", variant(1), tiny_processor)]
    soup(same, tmp_path / "soup")
    model = load_checkpoint(tmp_path / "soup")[0].cpu()
    with torch.no_grad():
        actual = model(pixel_values=pixel_values, **text_batch).logits_per_image
        expected = variant(1).eval()(pixel_values=pixel_values, **text_batch).logits_per_image
    torch.testing.assert_close(actual, expected)


def test_sharded_and_low_precision_checkpoints(tiny_processor, tmp_path):
    models = [variant(number).to(torch.bfloat16) for number in (1, 2, 3)]
    folders = []
    for number, model in enumerate(models):
        folders.append(saved(tmp_path / str(number), model, tiny_processor))
    (tmp_path / "1" / "model.safetensors").unlink()
    models[1].save_pretrained(folders[1], max_shard_size="50KB")
    assert (tmp_path / "1" / "model.safetensors.index.json").is_file()
    soup(folders, tmp_path / "soup")
    for name, parameter in load_checkpoint(tmp_path / "soup")[0].state_dict().items():
        mean = sum(model.state_dict()[name].double() for model in models) / 3
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.cpu().double(), mean, rtol=2**-8, atol=1e-6)  # rounded once


def test_checkpoints_of_a_run(tiny_processor, tmp_path):
    folders = []
    for number in (1, 2):
        folder = tmp_path / f"checkpoint-{number}"
        variant(number).save_pretrained(folder)  # what the Trainer saves, without sentence-transformers' files
        tiny_processor.save_pretrained(folder)
        (folder / "trainer_state.json").write_text("{}")
        folders.append(folder)
    soup(folders, tmp_path / "soup")
    assert (tmp_path / "soup" / "modules.json").is_file()
    assert not (tmp_path / "soup" / "trainer_state.json").exists()


def test_too_few_folders_are_refused(two, tmp_path):
    for folders in (two[:1], [two[0], two[0]], []):
        with pytest.raises(ValueError, match="expected two or more different ones"):
            soup(folders, tmp_path / "soup")


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [1], [1] * 3, [1, float("nan")], [1, float("inf")], [1e308] * 2])
def test_weights_that_make_no_mean_are_refused(weights, two, tmp_path):
    with pytest.raises(ValueError, match=r"`weights` is \[.*expected 2 numbers"):
        soup(two, tmp_path / "soup", weights)
    assert not (tmp_path / "soup").exists()


def test_used_folder_is_refused(two):
    with pytest.raises(FileExistsError, match="`out` is .* holds something"):
        soup(two, two[0])


def test_models_of_another_shape_are_refused(two, tiny_processor, tmp_path):
    other = saved(tmp_path / "other", variant(3, projection_dim=8), tiny_processor)
    with pytest.raises(ValueError, match="config.json: projection_dim is 16 in .*, but 8 in .*other"):
        soup([two[0], other], tmp_path / "soup")
    other = saved(tmp_path / "another", variant(3, vision="clip"), tiny_processor)
    with pytest.raises(ValueError, match="config.json: vision_config: .* is .* in .*another"):
        soup([two[0], other], tmp_path / "soup")


def test_fields_that_an_older_version_did_not_write_are_those_it_meant(two, tmp_path):
    older = json.loads((Path(two[0]) / "config.json").read_text())
    for name in ("vision_grid", "sequence_packing"):
        assert older.pop(name) is not None
    (Path(two[0]) / "config.json").write_text(json.dumps(older))
    assert soup(two, tmp_path / "soup") and soup(two[::-1], tmp_path / "other soup")


def test_a_checkpoint_and_a_hub_folder_mix(two, tiny_processor, tmp_path):
    variant(3).save_pretrained(tmp_path / "checkpoint-3")
    tiny_processor.save_pretrained(tmp_path / "checkpoint-3")
    assert soup([two[0], tmp_path / "checkpoint-3"], tmp_path / "soup")
    assert soup([tmp_path / "checkpoint-3", two[0]], tmp_path / "another soup")


def test_another_tokenizer_is_refused(two, tmp_path):
    path = tmp_path / "2" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(tokenizer | {"truncation": {"max_length": 7, "strategy": "LongestFirst", "stride": 0}}))
    soup(two, tmp_path / "same")
    tokenizer["model"]["vocab"]["new"] = len(tokenizer["model"]["vocab"])
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="different tokenizers"):
        soup(two, tmp_path / "soup")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("logit_scale"), "`logit_scale` is in .*1', but not in .*2'"),
        (lambda t: t.update(extra=torch.ones(1)), "`extra` is in .*2', but not in .*1'"),
        (lambda t: t.update(logit_scale=torch.ones(2)), r"`logit_scale` is torch.float32 \(1,\) in .*\(2,\) in .*2'"),
        (lambda t: t["logit_scale"].fill_(float("nan")), "`logit_scale` is not finite in .*2'"),
    ],
)
def test_weights_that_do_not_match_are_named(change, message, two, tmp_path):
    edit_weights(two[1], change)
    with pytest.raises(ValueError, match=message):
        soup(two, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_whole_numbers_must_be_equal(two, tmp_path):
    for folder, value in zip(two, (3, 4), strict=True):
        edit_weights(folder, lambda tensors, v=value: tensors.update(count=torch.tensor(v)))
    with pytest.raises(ValueError, match="`count` differs between .*1' and .*2', and has no mean"):
        soup(two, tmp_path / "soup")


def test_batches_that_a_batch_norm_has_seen_are_not_averaged(two, tmp_path):
    name = "vision_tower.norm.num_batches_tracked"
    for folder, value in zip(two, (3, 4), strict=True):
        edit_weights(folder, lambda tensors, v=value: tensors.update({name: torch.tensor(v)}))
    assert _average([Path(folder) for folder in two], [0.5, 0.5])[name] == 4


def test_adapters_and_missing_folders_are_refused(two, tmp_path):
    add_lora(build_model()).save_pretrained(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="config.json' is not there; expected the folder of a whole model"):
            soup([two[0], folder], tmp_path / "soup")
