import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_model
from transformers import modeling_utils

from benchmarks.campaign_jobs import fork
from mmgem import MMGEMModel
from mmgem.training import soup
from mmgem.training.loading import load_checkpoint, load_config
from mmgem.training.trainer.lora import add_lora, merge_lora


@pytest.fixture
def folder(tiny_processor, tmp_path):
    build_model().save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_who_writes_into_the_file_of_a_loaded_model_does_not_change_it(folder):
    model, _ = load_checkpoint(folder, device="cpu")
    expected, weights = model.get_text_features(torch.tensor([[20, 21]])).pooler_output, folder / "model.safetensors"
    with open(weights, "r+b") as file:  # as `cp` does
        file.seek(os.path.getsize(weights) // 2)
        file.write(bytes(os.path.getsize(weights) // 2))
    assert torch.equal(model.get_text_features(torch.tensor([[20, 21]])).pooler_output, expected)


@pytest.mark.parametrize("fails", [False, True], ids=["read", "not read"])
def test_a_checkpoint_that_is_written_while_it_is_read_is_refused(folder, monkeypatch, fails):
    def load(name, disable_mmap):
        config = folder / "config.json"
        config.write_text(config.read_text() + " ")
        if fails:
            raise ValueError("half a file")
        return build_model()

    monkeypatch.setattr(MMGEMModel, "from_pretrained", load)
    with pytest.raises(ValueError, match="`model` is '.*model', which was written while it was read; expected one th"):
        load_checkpoint(folder)


def test_weights_that_are_cut_while_they_are_loaded_end_no_process(folder, monkeypatch):
    load = modeling_utils.convert_and_load_state_dict_in_model

    def cut_and_load(*args, **kwargs):
        os.truncate(folder / "model.safetensors", 1000)
        return load(*args, **kwargs)

    def run():
        monkeypatch.setattr(modeling_utils, "convert_and_load_state_dict_in_model", cut_and_load)
        with pytest.raises(ValueError, match="which was written while it was read"):
            load_checkpoint(folder, device="cpu")

    assert fork(run)() == (0, None)


def test_a_soup_of_what_is_written_meanwhile_is_refused(folder, tmp_path, monkeypatch):
    def mean(paths, shares):
        (folder / "model.safetensors").write_bytes(b"")
        return None, None

    monkeypatch.setattr(soup, "_mean", mean)
    with pytest.raises(ValueError, match="`folders` is '.*model', which was written while it was read"):
        soup.soup([folder, tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter(folder):
    """LoRA within the folder of its model, and the model with it."""
    model = add_lora(MMGEMModel.from_pretrained(folder), r=2, lora_alpha=64)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.ones_(parameter)
    model.peft_config["default"].base_model_name_or_path = folder.name
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", merge_lora(model)


def text_embeds(model):
    return model.get_text_features(torch.tensor([[20, 21]])).pooler_output


def test_lora_is_merged_into_the_model_that_it_names(adapter, tmp_path):
    path, expected = adapter
    path.parent.parent.joinpath("elsewhere").mkdir()
    path.parent.rename(tmp_path / "elsewhere" / path.parent.name)
    path = tmp_path / "elsewhere" / path.parent.name / path.name
    model, processor = load_checkpoint(path, device="cpu")
    assert type(model) is MMGEMModel and not model.training and processor.tokenizer is not None
    torch.testing.assert_close(text_embeds(model), text_embeds(expected.eval()))
    without, _ = load_checkpoint(path.parent, device="cpu")
    assert not torch.allclose(text_embeds(without), text_embeds(model), atol=1e-3)
    assert load_config(path).text_config.hidden_size == without.config.text_config.hidden_size


def without_one(path):
    weights = load_file(path / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, path / "adapter_model.safetensors")


def with_another(path):
    weights = load_file(path / "adapter_model.safetensors")
    save_file(weights | {"base_model.model.head.lora_A.weight": torch.ones(2, 2)}, path / "adapter_model.safetensors")


def with_settings(**values):
    def damage(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (without_one, ValueError, "lora_B.* is missing or unknown"),
        (with_another, ValueError, "head.lora_A.* is missing or unknown"),
        (with_settings(r=3), ValueError, "size mismatch"),
        (with_settings(peft_type="none"), ValueError, "an adapter that cannot be added to '.*model' "),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"no"), ValueError, "expected a whole LoRA"),
        (
            lambda path: (path / "adapter_config.json").write_text("{"),
            ValueError,
            "adapter_config.json cannot be read",
        ),
        (
            with_settings(base_model_name_or_path=None),
            ValueError,
            "has None as `base_model_name_or_path`; expected the",
        ),
        (with_settings(base_model_name_or_path="gone"), FileNotFoundError, "`model` is 'gone'"),
        (
            lambda path: with_settings(base_model_name_or_path=str(path))(path),
            ValueError,
            "which is LoRA too; expected LoRA for a model",
        ),
    ],
)
def test_lora_that_does_not_fit_is_refused(adapter, damage, error, message):
    path, _ = adapter
    damage(path)
    with pytest.raises(error, match=message):
        load_checkpoint(path, device="cpu")
