import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from mmgem.training import demo
from mmgem.training.demo import run_demo
from mmgem.training.demo_page import FIGURES, data_uri, render_page

VOID = {"meta", "img", "rect"}


class Page(HTMLParser):
    """What a page is made of; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **wanted):
        return [own for name, own in self.tags if name == tag and wanted.items() <= own.items()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A demonstration whose captions are true, but for every other scene, whose captions are another scene's."""
    from tiny_models import build_model

    out = tmp_path_factory.mktemp("demo") / "out"

    def caption_folder(folder, model, processor, out, with_boxes):
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        with open(out, "w") as lines:
            for number, row in enumerate(rows):
                other = rows[number - number % 2]
                regions = row["region_captions"][:-1] + ["a large thing"]
                line = {"file_name": row["file_name"], "caption": other["captions"][-1], "region_captions": regions}
                lines.write(json.dumps(line) + "\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "caption_folder", caption_folder)
        processor = _processor()
        page, figures = run_demo(out, build_model(), processor, count=16)
    return out, json.loads((out / "demo.json").read_text()), page, figures


def _processor():
    from transformers import SiglipImageProcessorPil

    from mmgem.processing.processing_mmgem import MMGEMProcessor
    from mmgem.training.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a large red star at the top left"] * 20, vocab_size=300, model_max_length=200)
    return MMGEMProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, num_visual_tokens=4)
