"""The page `docs/compatibility.md`: families of models, each composed, trained for a step, saved, and loaded in a
fresh process without this package, where it embeds and writes the same. `make compatibility` writes the page again."""

import json
import re
from itertools import cycle
from pathlib import Path

import fresh_process
import pytest
import torch
import transformers
from language_models import CONFIGS, PACKING, REFUSED, build_language_model
from transformers import Siglip2VisionConfig
from vision_towers import VISION_TOWERS
from vlms import IMAGE, REFUSED_VLMS, VLM_CONFIGS, build_vlm, build_vlm_processor, vlm_inputs

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.patch_grid import flat_patches
from mmgem.tower_composition import build_vision_tower

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
SIZES = {"projection_dim": 16, "num_visual_tokens": 4}
NAFLEX = "siglip2"  # the tower that takes patches
LAYOUTS = {"tokens": "tokens", "channels_first": "feature map", "channels_last": "feature map, channels last"}
ATTENTION = {
    "causal": "as text",
    "image": "its tokens see each other",
    "prompt": "image and prompt see each other",
    "unknown": "in tiles: its captions are not trained",
}
LOADER = """
import json, sys
import torch
from transformers import AutoModel

worst = {}
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    differences = []
    for method, inputs, expected in torch.load(f"{folder}/calls.pt"):
        with torch.no_grad():
            found = getattr(model, method)(**inputs)
        found = found if method == "generate" else found.pooler_output
        differences.append(float((found - expected).abs().max()) if found.shape == expected.shape else float("inf"))
    worst[folder] = max(differences)
assert sys.modules["mmgem"] is None
print(json.dumps(worst))
"""


def pairs() -> list[tuple[str, str]]:
    """A vision tower and a language model, every language model once, every tower at least once."""
    return list(zip(cycle([*VISION_TOWERS, NAFLEX]), PACKING))


def compose(vision: str, text: str) -> tuple[MMGEMModel, dict]:
    """And images for it."""
    if vision == NAFLEX:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        tower, side = build_vision_tower(Siglip2VisionConfig(**size, num_patches=16, patch_size=8)).eval(), 32
    else:
        tower, side = VISION_TOWERS[vision].build(), VISION_TOWERS[vision].image_size
    model = MMGEMModel.from_towers(tower, build_language_model(text), **SIZES)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    if vision != NAFLEX:
        return model, {"pixel_values": images}
    patches, spatial_shapes = flat_patches(images, 8)
    return model, {"pixel_values": patches, "spatial_shapes": spatial_shapes}


def train_packed_and_not(model: MMGEMModel, batch: dict):
    """One step of each; without dropout they are the same."""
    packing, losses = model.config.sequence_packing, []
    for model.config.sequence_packing in {packing, "none"}:
        model.zero_grad()
        output = model.eval()(**batch, return_loss=True)
        output.loss.backward()
        losses.append(output.loss.item())
        gradient = model.get_input_embeddings().weight.grad
        assert output.loss.isfinite() and gradient.isfinite().all() and gradient.any()
    assert abs(losses[0] - losses[-1]) < 1e-4
    model.config.sequence_packing = packing
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()(**batch, return_loss=True).loss.backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


@torch.no_grad()
def save(model: MMGEMModel, calls: list[tuple[str, dict]], folder: Path):
    """With what the model answers."""
    model.save_pretrained(folder)
    answers = [getattr(model, method)(**inputs) for method, inputs in calls]
    outputs = [answer if isinstance(answer, torch.Tensor) else answer.pooler_output for answer in answers]
    torch.save([(*call, output) for call, output in zip(calls, outputs, strict=True)], folder / "calls.pt")


def check_in_a_fresh_process(folder: Path):
    folders = sorted(path.name for path in folder.iterdir())
    worst = json.loads(fresh_process.run(LOADER, *folders, cwd=folder, installed=False))
    assert {name: difference for name, difference in worst.items() if not difference <= 1e-5} == {}


def check_section(title: str, content: str, write: bool):
    """The section of the page, from its title to the next, says what was measured; or is written."""
    page = PAGE.read_text(encoding="utf-8")
    section = re.compile(rf"(?<=\n## {title}\n\n).*?(?=\n## |\Z)", re.DOTALL)
    assert section.search(page), f"`{title}` is no section of the page"
    if write:
        PAGE.write_text(section.sub(lambda _: content, page), encoding="utf-8")
    elif transformers.__version__.startswith("5.23."):  # which the page is about
        assert section.search(page)[0] == content, "`make compatibility` writes the page again"


def table(*rows: tuple) -> str:
    lines = [f"| {' | '.join(map(str, row))} |\n" for row in rows]
    return "".join([lines[0], f"|{'---|' * len(rows[0])}\n", *lines[1:]])


def refusal(compose_it, *arguments) -> str:
    """The sentence, but for what libraries say in it."""
    with pytest.raises(ValueError) as error:
        compose_it(*arguments)
    return re.sub(r" \((it raised|Error).*?\)(?=[,;])", "", str(error.value))


@pytest.mark.slow
@pytest.mark.families
def test_every_tower_and_language_model_does_what_the_page_says(tmp_path, request):
    towers, language_models = {}, []
    for vision, text in pairs():
        model, images = compose(vision, text)
        ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(2))
        mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
        train_packed_and_not(model, {"input_ids": ids, "attention_mask": mask, **images})
        prompt = torch.tensor([[model.config.image_token_id] * 4 + [7, 8]])
        prompt = {"input_ids": prompt.expand(2, -1), "attention_mask": torch.ones(2, 6, dtype=torch.long), **images}
        calls = [
            ("get_image_features", images),
            ("get_text_features", {"input_ids": ids, "attention_mask": mask}),
            ("get_multimodal_features", prompt),
            ("generate", prompt | {"max_new_tokens": 4, "do_sample": False}),
        ]
        save(model, calls, tmp_path / f"{vision}+{text}")
        grid = model.config.grid
        kind = "NaFlex patches" if vision == NAFLEX else LAYOUTS[grid.layout]
        beside = grid.prefix_tokens + grid.suffix_tokens
        kind += f", {beside} beside them" if beside else ""
        towers[vision] = f"`{model.config.vision_config.model_type}`", kind, grid.stride[0], _yes(grid.any_size)
        language_models.append((f"`{text}`", f"`{model.config.sequence_packing}`", f"`{vision}`"))
    check_in_a_fresh_process(tmp_path)
    refused = [(f"`{text}`", refusal(compose, "siglip", text)) for text in REFUSED]
    write = request.config.getoption("write_pages")
    check_section("Vision towers", table(("type", "grid", "stride", "other sizes"), *towers.values()), write)
    check_section("Language models", table(("type", "packed rows", "checked with"), *language_models), write)
    check_section("Refused language models", table(("type", "error"), *refused), write)


@pytest.mark.slow
@pytest.mark.families
def test_every_vlm_does_what_the_page_says(tmp_path, request):
    rows, refused = [], []
    for family in VLM_CONFIGS:
        vlm = build_vlm(family)
        if family in REFUSED_VLMS:
            refused.append((f"`{family}`", refusal(MMGEMModel.from_vlm, vlm)))
            continue
        with_processor = family in ("gemma3", "paligemma")
        processor = build_vlm_processor(family) if with_processor else None
        model = MMGEMModel.from_vlm(vlm, processor=processor, **SIZES)
        inputs = vlm_inputs(family)
        is_token = inputs["attention_mask"].bool()
        with torch.no_grad():
            difference = (model(**inputs).logits - vlm(**inputs).logits)[is_token].abs().max()
        assert difference <= 1e-4
        pixels = inputs["pixel_values"]
        images = pixels[:, 0] if pixels.ndim == 5 else pixels
        ids = torch.randint(3, IMAGE, (2, 9), generator=torch.Generator().manual_seed(2))
        if model.config.vlm_attention == "unknown":
            images = torch.randn(2, 3, *model.config.grid.image_size, generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "pixel_values": images}
        captions = {"labels": torch.full_like(ids, -100)} if model.config.vlm_attention == "unknown" else {}
        train_packed_and_not(model, batch | captions)
        calls = [
            ("get_image_features", {"pixel_values": images}),
            ("get_text_features", {"input_ids": ids}),
            ("get_multimodal_features", inputs),
            ("generate", inputs | {"max_new_tokens": 4, "do_sample": False}),
        ]
        save(model, calls, tmp_path / family)
        parts = (f"`{config.model_type}`" for config in (model.config.vision_config, model.config.text_config))
        rows.append((f"`{family}`", *parts, ATTENTION[model.config.vlm_attention], _yes(with_processor)))
    check_in_a_fresh_process(tmp_path)
    write = request.config.getoption("write_pages")
    head = "type", "vision encoder", "decoder", "reads an image", "`processor=` to train it"
    check_section("Vision-language models", table(head, *rows), write)
    check_section("Refused vision-language models", table(("type", "error"), *refused), write)


def test_the_page_names_every_family():
    sections = dict(re.findall(r"\n## (.*?)\n\n(.*?)(?=\n## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    for title, families in (("Language models", PACKING), ("Refused language models", REFUSED)):
        assert [row.split("`")[1] for row in sections[title].splitlines()[2:]] == list(families)
    assert set(PACKING) | set(REFUSED) == set(CONFIGS)
    assert {vision for vision, _ in pairs()} == {*VISION_TOWERS, NAFLEX}
    named = sections["Vision-language models"] + sections["Refused vision-language models"]
    assert all(f"| `{family}` |" in named for family in VLM_CONFIGS)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
