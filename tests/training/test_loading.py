import os

import pytest
import torch
from tiny_models import build_model
from transformers import modeling_utils

from benchmarks.campaign_jobs import fork
from mmgem import MMGEMModel
from mmgem.training import soup
from mmgem.training.loading import load_checkpoint


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
