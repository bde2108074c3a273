"""ONNX graphs give what the model gives, for any batch and length; and a search with them needs no torch."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from PIL import Image
from tiny_models import IMAGE_SIZE, TEXTS, build_model
from typer.testing import CliRunner

from mmgem.training.cli import app
from mmgem.training.inference import embed_images, embed_texts
from mmgem.training.loading import load_checkpoint
from mmgem.training.onnx_export import export_onnx

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "export.md").read_text()
WITHOUT_TORCH = "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['mmgem'] = None\n"


def noise(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The folder in which the commands of the page have run; `report.json` is what the last of them says."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    commands = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)[0].replace("--int8", "--int8 --json")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands.splitlines():
            program, *arguments = command.split()
            result = CliRunner().invoke(app, arguments)
            assert program == "mmgem" and result.exit_code == 0, result.output
    (folder / "report.json").write_text(result.stdout)
    return folder


def check_graphs(model, folder: Path, image_size: int):
    """Graphs and model agree on batches of every size, of texts of several lengths, padded on either side."""
    image_graph, text_graph = (InferenceSession(folder / name) for name in ("image.onnx", "text.onnx"))
    for size in range(1, 7):
        pixel_values = torch.randn(size, 3, image_size, image_size)
        length = 9 * size
        mask = (torch.arange(length) < torch.randint(1, length + 1, (size, 1))).long()
        mask = mask.flip(-1) if size % 2 else mask
        ids = torch.randint(2, 300, (size, length))
        with torch.no_grad():
            images = torch.nn.functional.normalize(model.get_image_features(pixel_values).pooler_output, dim=-1)
            texts = torch.nn.functional.normalize(model.get_text_features(ids, mask).pooler_output, dim=-1)
        actual = image_graph.run(None, {"pixel_values": pixel_values.numpy()})[0]
        np.testing.assert_allclose(actual, images, atol=1e-5)
        actual = text_graph.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        np.testing.assert_allclose(actual, texts, atol=1e-5)


@pytest.mark.slow
@pytest.mark.pages
def test_graphs_give_what_the_model_gives_at_every_batch_size(tiny_processor, tmp_path):
    model = build_model(layers=1)
    report = export_onnx(model, tiny_processor, tmp_path, noise(2), TEXTS)
    assert report.difference < 1e-5 and report.int8_recall is None
    assert report.files == [tmp_path / "image.onnx", tmp_path / "text.onnx"]
    check_graphs(model, tmp_path, IMAGE_SIZE)


@pytest.mark.slow
@pytest.mark.pages
def test_graphs_of_several_vectors_give_what_the_model_gives_at_every_batch_size(page):
    model, processor = load_checkpoint(ROOT / "model_cards" / "mmgem-tiny", device="cpu")
    assert model.config.num_embedding_tokens == 8 and model.config.embedding_pooling == "multi_vector"
    check_graphs(model, page / "exported", processor.image_processor.size["height"])


@pytest.mark.slow
@pytest.mark.pages
def test_the_code_of_the_page_searches_without_torch(page):
    result = json.loads((page / "report.json").read_text())
    assert result["recall"] > 0.9 and result["int8_recall"] > 0.9 and result["difference"] < 1e-5

    code = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    check = "np.savez('vectors.npz', images=images, texts=texts, scores=scores)\n"
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH + code + check], cwd=page, check=True)
    found = np.load(page / "vectors.npz")
    model, processor = load_checkpoint(ROOT / "model_cards" / "mmgem-tiny", device="cpu")
    paths = sorted(str(path) for path in (page / "gallery").glob("*.png"))
    texts = ["a large red star at the top left", "two small blue circles"]
    np.testing.assert_allclose(found["images"], embed_images(model, processor, paths), atol=1e-4)
    np.testing.assert_allclose(found["texts"], embed_texts(model, processor, texts), atol=1e-5)


def test_what_cannot_be_exported_is_refused(tiny_processor, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`images` holds 1 images for 1 texts; expected two or more"):
        export_onnx(build_model(), tiny_processor, tmp_path, noise(1), TEXTS[:1])

    def fail(*args, **kwargs):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match="`model` cannot be exported as image.onnx: no such operator"):
        export_onnx(build_model(), tiny_processor, tmp_path / "new", noise(2), TEXTS)
    assert not any(tmp_path.iterdir())
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="which holds something; expected a new or an empty folder"):
        export_onnx(build_model(), tiny_processor, tmp_path, noise(2), TEXTS)
