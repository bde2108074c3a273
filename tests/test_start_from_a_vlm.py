"""The page `docs/start_from_a_vlm.md`: its code runs, and says what the page says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "start_from_a_vlm.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), page)
    assert torch.equal(page["written"], page["expected"])
    assert page["outputs"].logits_per_image.shape == (1, 1) and page["fused"].shape == (1, 512)
    assert next(page["model"].connector.parameters()).grad.any()
    with torch.no_grad():
        torch.testing.assert_close(page["loaded"](**page["inputs"]).logits, page["vlm"](**page["inputs"]).logits)
