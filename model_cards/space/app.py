"""A page about a folder of photographs: search them by words, by a picture or by both, and look into one of them.

python app.py [FOLDER] [--model MODEL] [--index INDEX] [--port PORT]

The page asks no other host for anything, and a model that is in a folder is read from there.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import torch
from album import Album, load_picture, outline, read_box
from box_picker import box_picker, shown
from PIL import Image

from mmgem.training.loading import load_checkpoint
from mmgem.training.search.row_search import Hit

HERE = Path(__file__).parent
MODELS = [
    HERE / "mmgem-photo",
    HERE.parent / "mmgem-photo",
    HERE.parent / "mmgem-tiny",
]  # the first with weights
FIRST, TOP, TOP_REGIONS, SIDE = 48, 12, 4, 640
KINDS = {"Photographs": "image", "Parts of photographs": "region"}
THEME = gr.themes.Default(primary_hue="orange", neutral_hue="stone", font="system-ui", font_mono="monospace")
CSS = """
.gradio-container { width: 100% !important; max-width: 1320px !important; margin: 0 auto !important; }
.caption-label { font-size: 13px !important; }
"""
TILES = {"show_label": False, "object_fit": "contain", "allow_preview": False, "buttons": [], "container": False}


def build_pages(album: Album, name: str) -> gr.Blocks:
    """The pages about an album; `name` is the model's."""
    first = album.photographs[:FIRST]

    def tile(hit: Hit, query: torch.Tensor | None = None) -> tuple[Image.Image, str]:
        """A photograph that was found; a query that is given glows in it."""
        if hit.box is not None:
            picture = outline(load_picture(hit.path), hit.box)
        else:
            picture = load_picture(hit.path, SIDE)
            picture = picture if query is None else album.heat_map(picture, query)
        return picture, f"{hit.score:.2f}  {hit.path.name}"

    def search(words: str, picture: str | None, kind: str, glows: bool) -> tuple[list, list[str]]:
        query = album.query(words, None if picture is None else load_picture(picture))
        hits = album.nearest(query, TOP, KINDS[kind])
        return [tile(hit, query if glows else None) for hit in hits], [str(hit.path) for hit in hits]

    def look_into(path: str) -> tuple:
        picture = load_picture(path)
        return path, shown(picture), album.caption(picture), "", "", [], None, "", None

    def choose(paths: list[str], event: gr.SelectData) -> tuple:
        return gr.Tabs(selected="one"), *look_into(paths[event.index])

    def draw(path: str, event: gr.EventData) -> tuple[str, str, list]:
        sides = load_picture(path).size * 2
        corners = ", ".join(f"{share * side:.0f}" for share, side in zip(event.box, sides, strict=True))
        return corners, *look_at_box(path, corners)

    def look_at_box(path: str, corners: str) -> tuple[str, list]:
        picture, box = load_picture(path), read_box(corners)
        hits = album.nearest(album.query(picture=picture, box=box), TOP_REGIONS, "region", but=Path(path))
        return album.caption(picture, box), [tile(hit) for hit in hits]

    def classify(path: str, labels: str) -> dict[str, float]:
        return album.classify(load_picture(path), labels.split(","))

    def answer(path: str, question: str) -> str:
        return album.answer(load_picture(path), question)

    def show_heat(path: str, words: str) -> Image.Image:
        return album.heat_map(load_picture(path, 2 * SIDE), album.query(words))

    with gr.Blocks(title="mmgem", analytics_enabled=False) as pages:
        gr.Markdown(
            f"# Search photographs, and ask about them\n{len(album.photographs)} photographs, embedded and described "
            f"by one small open model, {name}. Choose one to look into it."
        )
        found, path = gr.State([str(photograph) for photograph in first]), gr.State(str(first[0]))
        with gr.Tabs() as tabs:
            with gr.Tab("Search", id="search"), gr.Row():
                with gr.Column(scale=1, min_width=280):
                    words = gr.Textbox(label="Words", placeholder="a cat", autofocus=True)
                    example = gr.Image(
                        label="Picture", type="filepath", sources=["upload", "clipboard"], height=220, buttons=[]
                    )
                    gr.Markdown("Words, a picture, or both, which then count alike.")
                    kind = gr.Radio(list(KINDS), value="Photographs", label="Find")
                    glows = gr.Checkbox(label="Show why: what is like the query glows", visible=album.has_heat_maps)
                    button = gr.Button("Search", variant="primary")
                with gr.Column(scale=3):
                    named = [(load_picture(photograph, SIDE), photograph.name) for photograph in first]
                    results = gr.Gallery(named, columns=4, height=700, elem_id="results", **TILES)
            with gr.Tab("One photograph", id="one"), gr.Row():
                with gr.Column(min_width=400):
                    picker = box_picker(elem_id="picker")
                    written = gr.Textbox(label="Caption", interactive=False)
                    upload = gr.UploadButton("Take a picture of your own", file_types=["image"])
                with gr.Column(min_width=400), gr.Tabs():
                    with gr.Tab("Boxes"):
                        with gr.Row():
                            part = gr.Textbox(label="Caption of the box", interactive=False)
                            corners = gr.Textbox(
                                label="Box: left, top, right, bottom", placeholder="draw it in the photograph"
                            )
                        gr.Markdown("The nearest parts of other photographs")
                        regions = gr.Gallery(columns=2, height="auto", elem_id="regions", **TILES)
                    with gr.Tab("Labels"):
                        labels = gr.Textbox(
                            "a person, an animal, food, a vehicle, a building",
                            label="Labels, with commas between them",
                            submit_btn=True,
                        )
                        shares = gr.Label(show_label=False, num_top_classes=8)
                    with gr.Tab("Questions"):
                        question = gr.Textbox("what is shown?", label="Question", submit_btn=True)
                        reply = gr.Textbox(label="Answer", interactive=False)
                    with gr.Tab("Heat map", visible=album.has_heat_maps):
                        searched = gr.Textbox(
                            label="What to look for in the photograph", placeholder="a face", submit_btn=True
                        )
                        heat = gr.Image(show_label=False, height=400, buttons=[], elem_id="heat")

        run = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}  # one at a time
        seen = [path, picker, written, corners, part, regions, shares, reply, heat]
        gr.on([button.click, words.submit], search, [words, example, kind, glows], [results, found], **run)
        results.select(choose, found, [tabs, *seen], **run)
        upload.upload(look_into, upload, seen, **run)
        pages.load(look_into, path, seen, **run)
        picker.drawn(draw, path, [corners, part, regions], **run)
        corners.submit(look_at_box, [path, corners], [part, regions], **run)
        labels.submit(classify, [path, labels], shares, **run)
        question.submit(answer, [path, question], reply, **run)
        searched.submit(show_heat, [path, searched], heat, **run)
    return pages


def main() -> None:
    """Start the server, and wait for its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="photographs; by default the free ones of other packages")
    parser.add_argument("--model", help="folder of a checkpoint, or a name on the Hub; by default mmgem-photo")
    parser.add_argument("--index", type=Path, help="folder for the index, kept for the next start")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or str(next(folder for folder in MODELS if (folder / "model.safetensors").is_file()))
        folder = arguments.folder or default_photographs(Path(scratch))
        album = Album(folder, arguments.index or Path(scratch, "index"), *load_checkpoint(model))
        pages = build_pages(album, Path(model).name)
        pages.launch(
            server_port=arguments.port,
            theme=THEME,
            css=CSS,
            show_error=True,
            max_file_size="32mb",
            footer_links=[],
            ssr_mode=False,
        )


def default_photographs(scratch: Path) -> Path:
    """The folder beside this file, or a new one of photographs that other packages have installed."""
    if (HERE / "photographs").is_dir():
        return HERE / "photographs"
    from mmgem.training.demo.photographs import copy_free_photographs

    copy_free_photographs(scratch / "photographs")
    return scratch / "photographs"


if __name__ == "__main__":
    main()
