"""Demonstrations of random models, and what their pages are made of."""

import json
from html.parser import HTMLParser

import pytest

from mmgem.training.demo import run as demo
from mmgem.training.demo.page import FIGURES

READING = ("edits", "instructed", "nested", "asked")  # sections that not every checkpoint has
VOID = {"meta", "img", "rect", "br"}


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


def demonstrate(out, model, processor):
    """A demonstration in which every other scene has true captions, and the rest those of another scene."""

    def caption_folder(folder, model, processor, out, with_boxes):
        rows = read_rows(folder)
        with open(out, "w") as lines:
            for number, row in enumerate(rows):
                caption = rows[number - number % 2]["captions"][-1]
                regions = [*row["region_captions"][:-1], "a large thing"]
                line = {"file_name": row["file_name"], "caption": caption, "region_captions": regions}
                lines.write(json.dumps(line) + "\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "caption_folder", caption_folder)
        patch.setattr(demo, "copy_free_photographs", lambda folder: 0)  # see `test_photographs`
        page, figures = demo.run_demo(out, model, processor, count=16)
    assert page == out / "index.html" and set(figures) <= set(FIGURES)
    return out, json.loads((out / "demo.json").read_text())


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
