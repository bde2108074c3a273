"""The catalogue: every public entry point against every kind of nonsense, in one table.

A row is an entry point, what it is given, and what comes of it: None, if that is accepted and every number that comes
out is finite, or what the error says, which names the argument, its value and what was expected.
"""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from sentence_transformers import SentenceTransformer
from tiny_models import build_model
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from mmgem.late_interaction import similarity
from mmgem.pipeline_mmgem import MMGEMImageToTextPipeline
from mmgem.processing import save_sentence_transformer
from mmgem.training.inference import (
    answer_from_memory,
    embed_fused,
    embed_images,
    embed_texts,
    generate_region_captions,
)
from mmgem.training.search.building import build_index
from mmgem.training.search.index import SearchIndex
from mmgem.training.search.storage import MANIFEST
from mmgem.training.trainer.arguments import MMGEMTrainingArguments

REFUSALS = (ValueError, TypeError, OSError, StrictDataclassError)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
BOX = [4.0, 4.0, 30.0, 30.0]
NAN, INF = float("nan"), float("inf")
PIXELS = torch.zeros(2, 3, 32, 32)
IDS = torch.tensor([[20, 21, 22], [30, 31, 32]])
BOXES = torch.tensor([[[0.0, 0.0, 0.5, 1.0]], [[0.0, 0.0, 0.0, 0.0]]])  # one of the first image
PLACES = torch.tensor([[1] * 4 + [20], [1] * 4 + [30]])


@pytest.fixture(scope="session")
def tools(tmp_path_factory, tiny_processor):
    """One model in everything that takes it, and the processor."""
    model = build_model(prompts={"query": "find "})
    folder = tmp_path_factory.mktemp("catalogue")
    save_sentence_transformer(model, tiny_processor, folder)
    encoder = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    pipe = MMGEMImageToTextPipeline(model=model, processor=tiny_processor)
    images = tmp_path_factory.mktemp("images")
    for number in range(2):
        PICTURE.rotate(90 * number).save(images / f"{number}.png")
    index = tmp_path_factory.mktemp("index")
    build_index(images, model, tiny_processor, index)
    return SimpleNamespace(
        model=model, processor=tiny_processor, encoder=encoder, pipe=pipe, folder=folder, index=index
    )


def of_processor(tools, **inputs):
    return tools.processor(**({"return_tensors": "pt"} | inputs))


def losses_of_batch(tools, **columns) -> dict:
    outputs = tools.model(**({"input_ids": IDS, "pixel_values": PIXELS, "return_loss": True} | columns))
    return {name: value for name, value in outputs.items() if not name.endswith("_norm")}  # a mean, of nothing NaN


def hits_of_damaged(tools, file=None, damage=None) -> torch.Tensor:
    """What is found in a copy of the index after damage was done to it."""
    folder = tools.folder / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tools.index, folder)
    if file is not None:
        data = DAMAGES[damage]((folder / file).read_bytes())
        (folder / file).unlink() if data is None else (folder / file).write_bytes(data)
    hits = SearchIndex.load(folder, tools.model, tools.processor).search("a red star")
    assert len(hits) == 2
    return torch.tensor([hit.score for hit in hits])


def loaded_index(tools) -> SearchIndex:
    return SearchIndex.load(tools.index, tools.model, tools.processor)


def arguments(tools, **values):
    return MMGEMTrainingArguments(
        **({"output_dir": str(tools.folder / "out"), "use_cpu": True, "report_to": "none"} | values)
    )


ENTRIES = {
    "processor": of_processor,
    "text features": lambda tools, **inputs: tools.model.get_text_features(**inputs),
    "image features": lambda tools, **inputs: tools.model.get_image_features(**inputs),
    "fused features": lambda tools, **inputs: tools.model.get_multimodal_features(**inputs),
    "forward": lambda tools, **inputs: tools.model(**inputs),
    "batch": losses_of_batch,
    "generate": lambda tools, **inputs: tools.model.generate(**({"max_new_tokens": 2, "do_sample": False} | inputs)),
    "pipeline": lambda tools, images, **inputs: tools.pipe(images, **({"max_new_tokens": 2} | inputs)),
    "encode": lambda tools, inputs, **options: tools.encoder.encode(inputs, **options),
    "embed_texts": lambda tools, texts: embed_texts(tools.model, tools.processor, texts),
    "embed_fused": lambda tools, images, texts: embed_fused(tools.model, tools.processor, images, texts),
    "answer_from_memory": lambda tools, **inputs: answer_from_memory(
        tools.model, tools.processor, max_new_tokens=2, **inputs
    ),
    "embed_images": lambda tools, images: embed_images(tools.model, tools.processor, images),
    "region captions": lambda tools, images, boxes: generate_region_captions(
        tools.model, tools.processor, images, boxes
    ),
    "search": lambda tools, **given: loaded_index(tools).search(**given) and None,
    "search_texts": lambda tools, texts: loaded_index(tools).search_texts(texts) and None,
    "nearest": lambda tools, query: loaded_index(tools).nearest(query) and None,
    "explain": lambda tools, row: loaded_index(tools).explain(row, torch.ones(1, 16)) and None,
    "similarity": lambda tools, **embeds: similarity(**embeds),
    "set_embedding_tokens": lambda tools, *given: build_model().set_embedding_tokens(*given),
    "set_embedding_prompt": lambda tools, prompt: build_model().set_embedding_prompt(prompt),
    "index": hits_of_damaged,
    "config": lambda tools, **values: build_model(**values) and None,
    "arguments": lambda tools, **values: arguments(tools, **values) and None,
}

NO_PICTURES = [
    ([], "`images` is empty; expected at least one image"),
    ([[]], "`images` is empty; expected at least one image"),
    ([None], r"`images\[0\]` is a NoneType; expected a PIL image, a path"),
    (3, r"`images\[0\]` is a int; expected a PIL image"),
    (2.5, r"`images\[0\]` is a float; expected"),
    (True, r"`images\[0\]` is a bool; expected"),
    ({"a": 1}, r"`images\[0\]` is a dict; expected"),
    (dict, r"`images\[0\]` is a type; expected"),
    (b"", r"`images\[0\]` is empty, 0 bytes; expected an image file"),
    (b"no picture", r"`images\[0\]` holds 10 bytes that are no image; expected an image file"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is in the format EPS, which is none of pixels; expected"),
    ("", r"`images\[0\]` \(''\) (is not there|cannot be read)"),
    ("nothing.png", r"`images\[0\]` \('nothing.png'\) is not there; expected the path of an image file"),
    (Path("nothing.png"), r"\('nothing.png'\) is not there"),
    ("a\0b.png", r"`images\[0\]` .* is not there"),
    ("/", r"`images\[0\]` \('/'\) cannot be read"),
    ("/dev/zero", r"`images\[0\]` \('/dev/zero'\) cannot be read: it is no regular file"),
    ("http://127.0.0.1/a.png", "is a URL, and fetching is off; expected a file, or `allow_urls`"),
    ("ftp://127.0.0.1/a.png", "is a URL, and fetching is off"),
    ("file:///etc/passwd", "is a URL, and fetching is off"),
    ("data:image/png;base64,####", "is not there"),
    ("x" * 5000, r"`images\[0\]` \('x{99}…\)"),
    (np.zeros((0, 0, 3)), r"has shape \(0, 0, 3\); expected \(H, W\)"),
    (np.zeros((6, 6, 5)), r"has shape \(6, 6, 5\)"),
    (np.zeros(7), r"has shape \(7,\)"),
    (np.full((4, 4, 3), NAN), "NaN or infinite; expected finite"),
    (np.full((4, 4, 3), -1.0), r"\[-1, -1\]; expected floats in \[0, 1\]"),
    (np.full((4, 4, 3), 300), r"\[300, 300\]; expected"),
    (np.zeros((4, 4, 3), dtype=complex), "pixels of type complex128; expected integers, floats or booleans"),
    (np.array([["a"]]), "expected integers, floats or booleans"),
    (np.ma.masked_array(np.zeros((4, 4, 3)), mask=True), "is an array with masked pixels; expected none"),
    (np.ma.masked_invalid(np.full((4, 4), NAN)), "is an array with masked pixels; expected none"),
    (torch.full((3, 4, 4), INF), "NaN or infinite"),
    (torch.zeros(3, 4, 4, dtype=torch.complex64).conj(), "pixels of type complex64"),
    (torch.zeros(3, 4, 4, device="meta"), "sparse, nested, quantized or on meta; expected a dense one"),
    (torch.zeros(3, 4, 4).to_sparse(), "expected a dense one"),
    (Image.new("RGB", (0, 5)), "is 0 x 5 pixels; expected at least one"),
]
NO_TENSORS = [  # where a tensor is expected
    ([[1.0]], "is a list; expected a dense tensor"),
    (np.zeros((2, 3)), "is a ndarray; expected a dense tensor"),
    ("a", "is a str; expected a dense tensor"),
    (torch.zeros(2, 3).to_sparse(), "is torch.sparse_coo; expected a dense tensor"),
]
NO_LISTS = [  # of images or texts
    ("ab", "is a str; expected a list"),
    (b"ab", "is a bytes; expected a list"),
    ({"a": 1}, "is a dict; expected a list"),
    (3, "is a int; expected a list"),
    (None, "is a NoneType; expected a list"),
    (np.zeros((4, 4, 3)), "is a ndarray; expected a list"),
    (torch.zeros(3, 4, 4), "is a Tensor; expected a list"),
]
NO_TEXTS = [
    ([], "`text` is an empty list; expected at least one text"),
    ([None], r"`text\[0\]` is a NoneType, None; expected a string"),
    (["a", 3], r"`text\[1\]` is a int, 3; expected a string"),
    (3, r"`text\[0\]` is a int, 3; expected a string"),
    (b"bytes", r"`text\[0\]` is a int, 98; expected a string"),
    ([["a"]], r"`text\[0\]` is a list"),
    ("\ud800", r"`text\[0\]` .*half a surrogate pair"),
    ("", None),
    (" \t\n", None),
    ("\0", None),
    ("a" * 100_000, None),
    ("🌟" * 50, None),
    (["", "a"], None),
]
NO_BOXES = [
    ([], "`boxes` holds the boxes of 0 images"),
    ([[]], "`boxes` is .*, without any box; expected at least one, or None"),
    ("boxes", "`boxes` is 'boxes'; expected for each image a list of"),
    (3, "`boxes` is 3; expected"),
    ([3], r"`boxes` is \[3\]; expected for each image a list of"),
    ([[["a", 0, 1, 2]]], "expected for each image a list of"),
    ([[[1, 2, 3]]], r"`boxes\[0\]` has shape \(1, 3\); expected \(number of boxes, 4\)"),
    ([[BOX], [BOX]], "the boxes of 2 images, but there are 1 images"),
    ([[[NAN, 0, 5, 5]]], r"`boxes\[0\]\[0\]` is \[nan, .*; expected finite pixel coordinates"),
    ([[[0, 0, INF, 5]]], "expected finite pixel coordinates"),
    ([[[9, 9, 3, 12]]], r"is \[9.0, 9.0, 3.0, 12.0\]; expected .* with x0 < x1"),
    ([[[5, 5, 5, 9]]], "with x0 < x1 and y0 < y1"),
    ([[["0", "0", "9", "9"]]], "`boxes` is .*'9'.*; expected for each image a list of"),
    (np.array([[["0", "0", "9", "9"]]]), "expected for each image a list of"),
    ([[[False, False, 9, 9]]], r"`boxes` is \[\[\[False, .*; expected for each image a list of"),
    (torch.ones(1, 1, 4).bool(), "expected for each image a list of"),
    ([[[0, 0, 10**400, 9]]], "expected for each image a list of"),
    ([[[0, 0, 9, np.datetime64("2020")]]], "expected for each image a list of"),
    ([[[0, 0, 9, None]]], "expected finite pixel coordinates"),
    ([np.ma.masked_array([BOX], mask=True)], "expected for each image a list of"),
    (torch.zeros(1, 1, 4, device="meta"), "expected for each image a list of"),
    ([np.ma.masked_array([BOX])], None),
    (torch.tensor([[BOX]]).bfloat16(), None),
    ([[[np.float32(4), np.int64(4), torch.tensor(30.0), 30]]], None),
    ([[[70, 50, 90, 60]]], "which lies outside its image; expected a box that overlaps"),
    ([[None]], r"`boxes\[0\]` has shape \(1,\); expected"),
    ([[[-5, -5, 9, 9]]], None),
    ([[[0, 0, 1e9, 1e9]]], None),
    ([[BOX] * 200], None),
    ([BOX], None),
]
NO_IDS = [
    ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"`input_ids` has shape \(3,\); expected \(B, L\)"),
    ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, r"`input_ids` has shape \(0, 3\); expected .* B at least 1"),
    ({"input_ids": torch.zeros(2, 3)}, "`input_ids` .*float32; expected whole numbers"),
    ({"input_ids": torch.tensor([[300]])}, "`input_ids` has 300; expected 0 to 299"),
    ({"input_ids": torch.tensor([[-1]])}, "`input_ids` has -1; expected 0 to 299"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, r"`attention_mask` has shape \(2, 4\); expected that of"),
    ({"input_ids": IDS.short()}, "`input_ids` is torch.int16; expected whole numbers, of 64 or 32 bits"),
    ({"input_ids": IDS, "attention_mask": torch.full((2, 3), 0.5)}, "`attention_mask` has 0.5; expected 1 for tokens"),
    ({"input_ids": IDS, "attention_mask": torch.full((2, 3), -INF)}, "`attention_mask` has -inf; expected 1 for"),
    ({"input_ids": IDS, "attention_mask": torch.full((2, 3), NAN)}, "`attention_mask` has nan; expected 1 for"),
    ({"input_ids": torch.full((1, 300), 20)}, "is 301 tokens long; the language model takes at most 256"),
    ({"input_ids": PLACES}, "`input_ids` holds image placeholders, but there are no `pixel_values`"),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, None),
    ({"input_ids": IDS, "attention_mask": torch.zeros(2, 3)}, None),
    ({"input_ids": IDS.int()}, None),
]
NO_PIXELS = [
    ({"pixel_values": torch.zeros(3, 32, 32)}, r"`pixel_values` has shape \(3, 32, 32\); expected"),
    ({"pixel_values": torch.zeros(2, 1, 32, 32)}, r"`pixel_values` has shape \(2, 1, 32, 32\); expected"),
    ({"pixel_values": torch.zeros(0, 3, 32, 32)}, r"`pixel_values` has shape \(0, 3, 32, 32\); expected"),
    ({"pixel_values": torch.zeros(2, 3, 32, 32, dtype=torch.long)}, "`pixel_values` .*int64; expected floating point"),
    ({"pixel_values": PIXELS.to(torch.float8_e4m3fn)}, "`pixel_values` is torch.float8_e4m3fn; expected floating poi"),
    (
        {"pixel_values": PIXELS, "boxes": torch.zeros(2, 1, 4).cfloat()},
        "`boxes` is torch.complex64; expected float",
    ),
    ({"pixel_values": torch.full((1, 3, 32, 32), NAN)}, "`pixel_values` .*NaN or infinite"),
    ({"pixel_values": PIXELS, "boxes": torch.zeros(2, 4)}, r"`boxes` has shape \(2, 4\); expected \(2, R, 4\)"),
    ({"pixel_values": PIXELS, "boxes": torch.rand(1, 1, 4)}, r"`boxes` has shape \(1, 1, 4\); expected \(2, R, 4\)"),
    ({"pixel_values": PIXELS, "boxes": torch.tensor([[[0.0, 0, 9, 9]]] * 2)}, r"`boxes` has .*9.0.*in \[0, 1\]"),
    ({"pixel_values": PIXELS, "boxes": torch.tensor([[[0.5, 0, 0.1, 1]]] * 2)}, "x0 < x1"),
    ({"pixel_values": PIXELS, "boxes": torch.full((2, 1, 4), NAN)}, "`boxes` has .*nan"),
    ({"pixel_values": PIXELS, "boxes": torch.zeros(2, 1, 4)}, None),
    ({"pixel_values": PIXELS}, None),
    ({"pixel_values": torch.zeros(1, 3, 48, 64)}, None),
]
NO_BATCHES = [
    ({"attention_mask": torch.ones(2, 4)}, r"`attention_mask` has shape \(2, 4\); expected that of `input_ids`"),
    ({"labels": torch.zeros(2, 4).long()}, r"`labels` has shape \(2, 4\); expected that of `input_ids`, \(2, 3\)"),
    ({"image_ids": torch.zeros(3)}, r"`image_ids` has shape \(3,\); expected \(2,\)"),
    ({"image_index": torch.tensor([0, 7])}, r"`image_index` is \[0, 7\]; expected 2 numbers below 2, or -1 for none"),
    ({"image_index": torch.tensor([0, -2])}, r"`image_index` is \[0, -2\]; expected"),
    ({"image_index": torch.tensor([0.0, 1.0])}, r"`image_index` is \[0.0, 1.0\]; expected 2 numbers"),
    ({"image_index": torch.tensor([0, 1, 1])}, r"`image_index` is \[0, 1, 1\]; expected 2 numbers"),
    ({"image_index": torch.tensor([[0], [1]])}, r"`image_index` is \[\[0\], \[1\]\]; expected 2 numbers"),
    ({"image_index": torch.tensor(0)}, "`image_index` is 0; expected 2 numbers"),
    ({"pixel_values": PIXELS[:1]}, "holds 1 images and `input_ids` 2 texts; expected pairs, or `image_index`"),
    ({"pixel_values": None}, "holds 0 images and `input_ids` 2 texts; expected pairs, or `image_index`"),
    ({"box_index": torch.tensor([0, -1])}, r"`box_index` is \[0, -1\], but `boxes` is None; expected the boxes"),
    ({"box_index": torch.tensor([1, -1]), "boxes": BOXES}, "`box_index` is .*, each of a box of the text's image"),
    ({"box_index": torch.tensor([-1, 0]), "boxes": BOXES}, "of a box of the text's image that is no padding"),
    ({"boxes": BOXES[:1]}, r"`boxes` has shape \(1, 1, 4\); expected \(2, R, 4\)"),
    ({"boxes": 9 * BOXES}, r"`boxes` has .*9.0.*; expected .* in \[0, 1\]"),
    ({"fused_index": torch.tensor([[0, 5], [1, -1]])}, r"`fused_index` is .*; expected 2 lists of numbers below 2"),
    ({"fused_index": torch.zeros(2, 1, 1).long()}, "`fused_index` is .*; expected 2 lists of numbers"),
    ({"target_row": torch.tensor([2, -1])}, r"`target_row` is \[2, -1\]; expected 2 numbers below 2"),
    ({"memory_row": torch.tensor([-1, 2])}, r"`memory_row` is \[-1, 2\]; expected 2 numbers below 2"),
    ({"contrastive_mask": torch.ones(2).long()}, r"`contrastive_mask` is torch.int64 of shape \(2,\); expected"),
    ({"hard_negative_mask": torch.ones(3).bool()}, r"`hard_negative_mask` is .*\(3,\); expected \(2,\) torch.bool"),
    (
        {"image_index": torch.tensor([0, -1]), "contrastive_mask": torch.ones(2).bool()},
        "`contrastive_mask` is True for a text whose `image_index` is -1; expected an image",
    ),
    ({"input_ids": IDS + 300}, "`input_ids` has 320; expected 0 to 299"),
    ({"input_ids": torch.full((2, 300), 20)}, "is 30[0-9] tokens long; the language model takes at most 256"),
    ({"pixel_values": PIXELS.long()}, "`pixel_values` is torch.int64; expected floating point"),
    ({"pixel_values": PIXELS + NAN}, "`pixel_values` has values that are NaN or infinite"),
    ({"patch_features": torch.zeros(2, 32, 4, 4)}, "`patch_features` came with `pixel_values`"),
    ({"pixel_values": None, "patch_features": torch.zeros(2, 9, 4, 4)}, r"has shape \(2, 9, 4, 4\); expected \(I, 32"),
    ({"no_column": IDS}, "`no_column` is no column of the texts of a batch; expected some of input_ids"),
    ({"labels": torch.full((2, 3), -100)}, None),
    ({"attention_mask": torch.zeros(2, 3).long()}, None),
    ({"input_ids": torch.zeros(2, 0).long()}, None),
    ({"num_items_in_batch": 0}, None),
    ({"image_index": torch.tensor([1, 1]), "image_ids": torch.tensor([5, 5])}, None),
    ({"image_index": torch.tensor([-1, -1])}, None),
    ({"pixel_values": None, "image_index": torch.tensor([-1, -1])}, None),
    ({"pixel_values": None, "patch_features": torch.zeros(2, 32, 4, 4)}, None),
    ({"box_index": torch.tensor([0, -1]), "boxes": BOXES}, None),
    ({}, None),
]
NO_GENERATION = [
    ({"num_beams": 0}, "`num_beams` is 0; expected a whole number of at least 1"),
    ({"num_beams": -1}, "`num_beams` is -1; expected a whole number"),
    ({"num_beams": 1.5}, "`num_beams` is 1.5; expected a whole number"),
    ({"num_beams": "two"}, "`num_beams` is 'two'; expected"),
    ({"num_beams": True}, "`num_beams` is True; expected"),
    ({"num_beams": 2, "num_return_sequences": 0}, "`num_return_sequences` is 0; expected a whole number of at least"),
    ({"num_return_sequences": 2}, "`num_return_sequences`"),
    ({"max_new_tokens": -1}, "`max_new_tokens` is -1; expected"),
    ({"max_new_tokens": 1.5}, "`max_new_tokens` is 1.5; expected"),
    ({"max_length": 0}, "`max_length` is 0; expected"),
    ({"min_new_tokens": -1}, "`min_new_tokens` is -1; expected a whole number of at least 0"),
    ({"no_repeat_ngram_size": -1}, "`no_repeat_ngram_size` is -1; expected"),
    ({"do_sample": "yes"}, "`do_sample` is 'yes'; expected True or False"),
    ({"use_cache": "no"}, "`use_cache` is 'no'; expected True or False"),
    ({"do_sample": True, "top_p": 2.0}, "`top_p` is 2.0; expected a number from 0 to 1"),
    ({"do_sample": True, "top_p": NAN}, "`top_p` is nan; expected"),
    ({"do_sample": True, "typical_p": 2.0}, "`typical_p` is 2.0; expected"),
    ({"do_sample": True, "temperature": 0.0}, "`temperature`"),
    ({"do_sample": True, "temperature": NAN}, "`temperature`"),
    ({"do_sample": True, "temperature": 1e-300}, "`temperature` is 1e-300; expected a number from 1e-6 on"),
    ({"num_beams": 2, "length_penalty": NAN}, "`length_penalty` is nan; expected a finite number"),
    ({"guidance_scale": NAN}, "`guidance_scale` is nan; expected a finite number"),
    ({"max_time": "long"}, "`max_time` is 'long'; expected a finite number"),
    ({"eos_token_id": 300}, "`eos_token_id` is 300; expected token ids from 0 to 299"),
    ({"eos_token_id": [2, -5]}, r"`eos_token_id` is \[2, -5\]; expected token ids"),
    ({"pad_token_id": "a"}, "`pad_token_id` is 'a'; expected token ids"),
    ({"forced_bos_token_id": 300}, "`forced_bos_token_id` is 300; expected token ids from 0 to 299"),
    ({"suppress_tokens": [300]}, r"`suppress_tokens` is \[300\]; expected token ids from 0 to 299"),
    ({"begin_suppress_tokens": [-5]}, r"`begin_suppress_tokens` is \[-5\]; expected token ids"),
    ({"suppress_tokens": [5], "begin_suppress_tokens": [6]}, None),
    (
        {"generation_config": {"num_beams": 2}},
        "`generation_config` is {'num_beams': 2}; expected a `GenerationConfig`",
    ),
    ({"generation_config": GenerationConfig(eos_token_id=300)}, "`eos_token_id` is 300; expected token ids"),
    ({"generation_config": GenerationConfig(pad_token_id=-1)}, "`pad_token_id` is -1; expected token ids"),
    ({"generation_config": GenerationConfig(num_beams=2, eos_token_id=3, pad_token_id=0)}, None),
    ({"num_beams": 2, "num_return_sequences": 2, "eos_token_id": [2, 3], "top_k": None}, None),
    ({"do_sample": True, "top_p": 0.5, "temperature": 2.0}, None),
]

FILES_OF_INDEX = ("rows-1.parquet", "embedding-1.npy", "probes-1.safetensors")
DAMAGES = {  # what becomes of the bytes of a file
    "removed": lambda data: None,
    "emptied": lambda data: b"",
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"0",
    "zeros at the end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "no text": lambda data: b"\xff\xfe",
    "a list": lambda data: b"[]",
    "a mapping": lambda data: b"{}",
    "deep": lambda data: b"[" * 100_000,
    "a word": lambda data: data.replace(b"settings", b"setting_"),
    "another format": lambda data: b'{"format": 99}',
}
NO_INDEX = [
    *[
        ({"file": file, "damage": damage}, f"{file}.*; expected (a whole one|what was written|[0-9]+)")
        for file in FILES_OF_INDEX
        for damage in list(DAMAGES)[:7]
    ],
    ({"file": MANIFEST, "damage": "removed"}, f"which is no index; expected a folder with {MANIFEST}"),
    *[
        ({"file": MANIFEST, "damage": damage}, f"whose {MANIFEST} is damaged; expected a whole one. Delete it")
        for damage in list(DAMAGES)[1:]
        if damage not in ("a mapping", "another format")
    ],
    ({"file": MANIFEST, "damage": "a mapping"}, "an index of format 1; expected format"),
    ({"file": MANIFEST, "damage": "another format"}, "an index of format 99; expected format"),
    ({}, None),
]
ROWS = [
    *[("processor", {"images": value}, outcome) for value, outcome in NO_PICTURES],
    *[("processor", {"text": value}, outcome) for value, outcome in NO_TEXTS],
    *[("processor", {"images": PICTURE, "boxes": value}, outcome) for value, outcome in NO_BOXES],
    ("processor", {}, "`images` and `text` are both None; expected at least one"),
    ("processor", {"text": "a", "boxes": [[BOX]]}, "`boxes` was given without `images`"),
    ("processor", {"images": PICTURE, "text": "<image><image>"}, "has 2 <image> placeholders for 1 images"),
    ("processor", {"images": [PICTURE] * 3, "text": "<image>"}, "has 1 <image> placeholders for 3 images"),
    ("processor", {"images": PICTURE, "text": "<image>a", "max_length": 2}, "max_length"),
    ("processor", {"text": "a", "padding": "perhaps"}, "perhaps"),
    ("processor", {"text": "a", "truncation": "perhaps"}, "perhaps"),
    ("processor", {"text": "a", "max_length": 0}, "`max_length` is 0; expected a whole number of at least 1"),
    ("processor", {"text": "a", "max_length": -3}, "`max_length` is -3; expected"),
    ("processor", {"text": "a", "max_length": "ten"}, "`max_length` is 'ten'; expected"),
    ("processor", {"text": "a", "max_length": 10**9}, "`max_length` is 1000000000; expected .* at most 1,048,576"),
    ("processor", {"text": "a", "max_length": 10**30}, "`max_length` is 10{30}; expected"),
    ("processor", {"text": "a", "max_length": 100, "padding": "max_length"}, None),
    ("processor", {"text": "a", "text_kwargs": {"max_length": 10**9, "padding": "max_length"}}, "`max_length` is 100"),
    ("processor", {"text": "a", "text_kwargs": 3}, "`text_kwargs` is 3; expected a mapping"),
    ("processor", {"images": PICTURE, "images_kwargs": 3}, "`images_kwargs` is 3; expected a mapping"),
    ("processor", {"text": "a", "pad_to_multiple_of": 10**8}, "`pad_to_multiple_of` is 100000000; expected"),
    ("processor", {"text": "a", "pad_to_multiple_of": 0}, "`pad_to_multiple_of` is 0; expected"),
    ("processor", {"text": "a", "max_length": 3, "stride": -1}, "`stride` is -1; expected a whole number"),
    ("processor", {"images": PICTURE, "size": (32, 32)}, None),
    ("processor", {"images": PICTURE, "size": 5000}, "`shortest_edge` of `size` is 5000; expected at most 4096"),
    *[
        ("processor", {"images": PICTURE, name: value}, f"`{name}` is .*; expected at most 268,435,456 pixels")
        for name in ("size", "crop_size", "pad_size")
        for value in (10**5, (10**5, 10**5), {"height": 10**5, "width": 10**5})
    ],
    ("processor", {"images": PICTURE, "images_kwargs": {"size": 10**5}}, "`size` is 100000; expected at most"),
    ("processor", {"text": "a", "padding_side": "above"}, "above"),
    ("processor", {"text": "a", "return_tensors": "xx"}, "xx"),
    ("processor", {"videos": [1], "text": "a"}, "`videos` or `audio` was given; expected only images and texts"),
    *[("text features", inputs, outcome) for inputs, outcome in NO_IDS],
    *[("text features", {"input_ids": value}, f"`input_ids` {outcome}") for value, outcome in NO_TENSORS],
    *[("text features", {"input_ids": IDS, "attention_mask": value}, outcome) for value, outcome in NO_TENSORS],
    *[("image features", {"pixel_values": value}, f"`pixel_values` {outcome}") for value, outcome in NO_TENSORS],
    *[("image features", {"pixel_values": PIXELS, "boxes": value}, outcome) for value, outcome in NO_TENSORS],
    *[("embed_images", {"images": value}, f"`images` {outcome}") for value, outcome in NO_LISTS],
    *[("embed_texts", {"texts": value}, f"`texts` {outcome}") for value, outcome in NO_LISTS],
    *[("search_texts", {"texts": value}, f"`texts` {outcome}") for value, outcome in NO_LISTS],
    *[("embed_fused", {"images": value, "texts": ["a"]}, f"`images` {outcome}") for value, outcome in NO_LISTS],
    ("embed_images", {"images": [np.asarray(PICTURE)[::-1, ::-1], np.asarray(PICTURE).astype(">u2")]}, None),
    ("embed_images", {"images": iter([PICTURE])}, None),
    ("embed_images", {"images": pandas.Series([PICTURE], index=[7])}, None),
    ("embed_texts", {"texts": pandas.Series(["a"], index=[7])}, None),
    ("embed_texts", {"texts": (text for text in "ab")}, None),
    ("embed_texts", {"texts": np.array(["a", "b"])}, None),
    ("embed_texts", {"texts": ["a", None]}, "`text` is a NoneType, None; expected a string"),
    ("embed_texts", {"texts": [b"a"]}, "`text` is a bytes, b'a'; expected a string"),
    ("region captions", {"images": [PICTURE], "boxes": []}, "`images` holds 1 entries; expected 0, one for each of"),
    ("search", {"text": 3}, "`text` is a int, 3; expected a string"),
    ("search", {"text": ["a"]}, r"`text` is a list, \['a'\]; expected a string"),
    ("search", {"text": "a", "top": True}, "`top` is True; expected 1 or more"),
    ("search", {"text": "a", "top": 2.0}, "`top` is 2.0; expected 1 or more"),
    ("search", {"text": "a", "top": None}, "`top` is None; expected 1 or more"),
    ("search", {"text": "a", "top": np.int64(2)}, None),
    ("search_texts", {"texts": [None]}, "`text` is a NoneType, None; expected a string"),
    ("search", {"text": "a", "where": "width>0"}, "`where` is 'width>0'; expected a list of Condition"),
    ("search", {"text": "a", "where": ["width>0"]}, r"`where` is \['width>0'\]; expected a list of Condition"),
    ("search", {"text": "a", "kinds": "image"}, "`kinds` is 'image'; expected a list of str"),
    ("search", {"text": "a", "kinds": iter(["image"])}, None),
    ("search", {"text": "a", "lexical_weight": True}, "`lexical_weight` is True; expected 0 to 1"),
    ("explain", {"row": 999}, "`row` is 999; expected 0 to 1"),
    ("explain", {"row": True}, "`row` is True; expected 0 to 1"),
    ("nearest", {"query": torch.zeros(1, 16, device="meta")}, "expected a finite tensor"),
    ("nearest", {"query": torch.ones(1, 16, requires_grad=True)}, None),
    ("nearest", {"query": 0}, r"`query` is a int; expected a finite tensor, \(1, 16\) or"),
    ("nearest", {"query": torch.zeros(16)}, r"`query` is of shape \(16,\); expected"),
    ("nearest", {"query": torch.zeros(1, 15)}, r"`query` is of shape \(1, 15\); expected"),
    ("nearest", {"query": torch.full((1, 16), NAN)}, "expected a finite tensor"),
    ("nearest", {"query": torch.ones(1, 16, dtype=torch.bfloat16) / 4}, None),
    *[("image features", inputs, outcome) for inputs, outcome in NO_PIXELS],
    ("fused features", {"input_ids": PLACES, "pixel_values": PIXELS[:1]}, "8 image placeholders, .* 4 in all"),
    ("fused features", {"input_ids": IDS, "pixel_values": PIXELS}, "0 image placeholders, .* 8 in all"),
    ("fused features", {"input_ids": PLACES, "boxes": torch.rand(2, 1, 4)}, "`boxes` came without `pixel_values`"),
    ("fused features", {"input_ids": PLACES, "pixel_values": PIXELS, "max_rationale_tokens": -1}, "is -1; expected"),
    ("fused features", {"input_ids": PLACES, "pixel_values": PIXELS, "max_rationale_tokens": 1.5}, "is 1.5; exp"),
    ("fused features", {"input_ids": PLACES, "pixel_values": PIXELS, "visual_tokens": PIXELS}, "`visual_tok"),
    ("fused features", {"input_ids": PLACES, "visual_tokens": PIXELS}, r"`visual_tokens` has shape .*expected \(u"),
    ("fused features", {"input_ids": PLACES, "pixel_values": PIXELS}, None),
    ("forward", {"input_ids": PLACES, "pixel_values": PIXELS, "visual_tokens": PIXELS}, "`visual_tokens` came with"),
    ("forward", {"input_ids": IDS, "visual_tokens": PIXELS, "return_loss": True}, "`visual_tokens` came with `ret"),
    ("forward", {}, "`input_ids` and `pixel_values` are both None; expected at least one"),
    ("forward", {"input_ids": PLACES}, "image placeholders, but there are no `pixel_values`"),
    ("text features", {"input_ids": IDS, "attention_msk": IDS}, "`attention_msk` is no argument of `get_text_feat"),
    ("text features", {"input_ids": IDS, "position_ids": IDS}, "`position_ids` is no argument of `get_text_features`"),
    ("text features", {"input_ids": IDS, "position_ids": None}, None),
    ("image features", {"pixel_values": PIXELS, "box": BOXES}, "`box` is no argument of `get_image_features`; expec"),
    ("fused features", {"input_ids": PLACES, "pixel_values": PIXELS, "box": BOXES}, "`box` is no argument of `get_m"),
    ("forward", {"input_ids": IDS, "pixel_values": PIXELS, "returnloss": True}, "`returnloss` is no argument of `fo"),
    ("forward", {"input_ids": IDS, "pixel_values": PIXELS, "output_attentions": False}, None),
    ("image features", {"pixel_values": PIXELS[:, :, :0]}, r"`pixel_values` has shape \(2, 3, 0, 32\); expected"),
    ("forward", {"input_ids": IDS, "labels": IDS - 30}, "`labels` has -10; expected 0 to 299, or -100"),
    ("forward", {"input_ids": IDS, "labels": IDS + 270}, "`labels` has 300; expected 0 to 299, or -100"),
    ("forward", {"input_ids": IDS, "labels": IDS.float()}, "`labels` is torch.float32; expected whole numbers"),
    ("forward", {"input_ids": IDS, "labels": IDS[:, :2]}, r"`labels` has shape \(2, 2\); expected that of `input_ids"),
    ("forward", {"input_ids": IDS, "labels": IDS.tolist()}, "`labels` is a list; expected a dense tensor"),
    ("forward", {"input_ids": IDS, "labels": IDS}, None),
    ("forward", {"input_ids": IDS, "pixel_values": PIXELS, "labels": IDS}, "`labels` came with images and texts"),
    ("forward", {"input_ids": IDS, "pixel_values": PIXELS, "boxes": torch.rand(2, 1, 4)}, "`boxes` "),
    ("forward", {"input_ids": IDS, "image_index": IDS[:, 0]}, "`image_index` came without `return_loss=True`"),
    *[("batch", columns, outcome) for columns, outcome in NO_BATCHES],
    ("forward", {"input_ids": IDS, "pixel_values": PIXELS}, None),
    ("generate", {"input_ids": PLACES}, "image placeholders, but there are no `pixel_values`"),
    ("generate", {"input_ids": PLACES, "pixel_values": PIXELS[:1]}, "8 image placeholders"),
    ("generate", {"input_ids": PLACES, "pixel_values": PIXELS[:1], "num_beams": 2}, "8 image placeholders"),
    ("generate", {"pixel_values": PIXELS[:1]}, "`pixel_values` came, but `input_ids` has no image placeholders"),
    ("generate", {"inputs_embeds": torch.zeros(1, 3, 31)}, r"has shape \(1, 3, 31\); expected \(B, L, 32\)"),
    ("generate", {"inputs_embeds": torch.zeros(1, 3, 32)}, None),
    ("forward", {"inputs_embeds": torch.zeros(1, 3, 31)}, r"`inputs_embeds` has shape \(1, 3, 31\); expected"),
    ("forward", {"inputs_embeds": 3}, "`inputs_embeds` is a int; expected a dense tensor"),
    ("forward", {"inputs_embeds": torch.zeros(1, 3, 32)}, None),
    ("forward", {"inputs_embeds": torch.zeros(2, 3, 32), "input_ids": IDS}, "`inputs_embeds` and `input_ids` came"),
    ("forward", {"inputs_embeds": torch.zeros(2, 3, 32), "pixel_values": PIXELS}, "and `pixel_values` came together"),
    ("forward", {"input_ids": IDS[:, :0]}, r"`input_ids` has shape \(2, 0\); expected tokens of each prompt"),
    ("forward", {"input_ids": IDS[:0]}, r"`input_ids` has shape \(0, 3\); expected tokens of each prompt"),
    ("generate", {"embedding_tokens": torch.zeros(1, 2, 32)}, r"`embedding_tokens` has shape \(1, 2, 32\); expected"),
    ("generate", {"embedding_tokens": torch.zeros(1, 32)}, r"`embedding_tokens` has shape \(1, 32\); expected"),
    ("generate", {"embedding_tokens": torch.zeros(1, 1, 31)}, r"`embedding_tokens` has shape \(1, 1, 31\); expected"),
    ("generate", {"embedding_tokens": torch.zeros(1, 1, 32), "pixel_values": PIXELS}, "both given; expected one"),
    ("generate", {"embedding_tokens": torch.zeros(1, 1, 32), "input_ids": IDS}, "1 memories for 2 texts"),
    ("generate", {"input_ids": PLACES, "pixel_values": PIXELS, "max_new_tokens": 0}, "max_new_tokens"),
    ("generate", {"input_ids": PLACES, "pixel_values": PIXELS, "no_argument": 1}, "no_argument"),
    ("generate", {"input_ids": PLACES, "pixel_values": PIXELS}, None),
    ("generate", {"input_ids": torch.full((1, 256), 20)}, "`input_ids` is 256 tokens long .*; expected at most 255"),
    ("generate", {"input_ids": IDS, "min_new_tokens": 254}, "`min_new_tokens` is 254 after 3 tokens; expected at mos"),
    ("generate", {"input_ids": IDS, "min_length": 257}, "`min_length` is 257 after 3 tokens; expected at most 256"),
    ("generate", {"embedding_tokens": torch.zeros(1, 1, 32), "min_new_tokens": 256}, "is 256 after 1 tokens; expect"),
    *[("generate", {"input_ids": PLACES, "pixel_values": PIXELS} | given, error) for given, error in NO_GENERATION],
    *[("pipeline", {"images": value}, outcome) for value, outcome in NO_PICTURES[2:10] if value is not None],
    ("pipeline", {"images": []}, "`images` is an empty list; expected at least one image"),
    ("pipeline", {"images": [PICTURE], "boxes": []}, "`boxes` has 0 entries for 1 images"),
    ("pipeline", {"images": PICTURE, "boxes": [[1, 2, 3]]}, "expected"),
    ("pipeline", {"images": PICTURE, "prompt": 3}, "`prompt` is 3; expected a string"),
    ("pipeline", {"images": PICTURE, "prompt": "<image><image>"}, "2 <image> placeholders for 1 images"),
    ("pipeline", {"images": PICTURE, "generate_kwargs": {"max_new_tokens": 3}}, "`max_new_tokens` is given twice"),
    ("pipeline", {"images": PICTURE, "prompt": ""}, None),
    ("encode", {"inputs": [3]}, "Unsupported|expected|int"),
    ("encode", {"inputs": [None]}, "Unsupported|expected|None"),
    ("encode", {"inputs": [{}]}, "Empty dict input is not a valid input"),
    ("encode", {"inputs": [{"text": 3}]}, "`inputs` has a text of type int; expected a string"),
    ("encode", {"inputs": [{"text": None}]}, "`inputs` has a text of type NoneType; expected a string"),
    ("encode", {"inputs": [{"image": "nothing.png"}]}, "is not there; expected the path of an image file"),
    ("encode", {"inputs": [{"image": "nothing.png", "text": "a"}]}, "is not there"),
    ("encode", {"inputs": [{"image": [PICTURE, PICTURE]}]}, "has a list of 2 images without a text; expected one"),
    ("encode", {"inputs": [{"image": PICTURE, "boxes": [BOX, BOX]}]}, "has 2 boxes without a text; expected one box"),
    ("encode", {"inputs": [{"image": PICTURE, "boxes": []}]}, "expected a list of"),
    ("encode", {"inputs": [{"image": PICTURE, "boxes": "box"}]}, "has the boxes 'box'; expected a list"),
    ("encode", {"inputs": [{"image": PICTURE, "boxes": [[9, 9, 1, 1]]}]}, "with x0 < x1"),
    ("encode", {"inputs": [{"text": "a", "boxes": [BOX]}]}, "has boxes without an image"),
    ("encode", {"inputs": [{"image": PICTURE, "text": "<image><image>"}]}, "2 <image> placeholders for 1 images"),
    ("encode", {"inputs": ["a"], "prompt_name": "nobody"}, "nobody"),
    ("encode", {"inputs": ["a"], "num_vectors": 0}, "`num_vectors` is 0; expected a whole number from 1"),
    ("encode", {"inputs": ["a"], "num_vectors": 2}, "`num_vectors` is 2; expected a whole number from 1 to 1"),
    ("encode", {"inputs": ["a"], "num_vectors": "one"}, "`num_vectors` is 'one'; expected"),
    ("encode", {"inputs": ["a"], "max_rationale_tokens": -1}, "`max_rationale_tokens` is -1; expected a whole number"),
    ("encode", {"inputs": ["\ud800"]}, "half a surrogate pair"),
    ("encode", {"inputs": ["", " ", "<image>", "a" * 9999, "nothing.png"]}, None),
    ("encode", {"inputs": [PICTURE, "a", {"image": PICTURE, "text": ""}, {"image": PICTURE, "boxes": [BOX]}]}, None),
    ("encode", {"inputs": []}, None),
    ("encode", {"inputs": "a"}, None),
    ("encode", {"inputs": PICTURE}, None),
    ("encode", {"inputs": [{"image": PICTURE, "text": "a", "boxes": [BOX]}]}, None),
    ("encode", {"inputs": [{"image": [PICTURE, PICTURE], "text": "<image> or <image>?"}]}, None),
    ("encode", {"inputs": [np.zeros((0, 0, 3))]}, r"has shape \(0, 0, 3\); expected \(H, W\)"),
    ("encode", {"inputs": [np.full((4, 4, 3), NAN)]}, "NaN or infinite; expected finite"),
    ("encode", {"inputs": [{"image": b"no picture"}]}, "holds 10 bytes that are no image; expected an image file"),
    ("encode", {"inputs": [{"image": None}]}, "is a NoneType; expected a PIL image"),
    ("encode", {"inputs": [{"image": []}]}, "expected"),
    ("encode", {"inputs": [{"image": PICTURE, "text": "\ud800"}]}, "half a surrogate pair"),
    ("encode", {"inputs": [{"image": PICTURE, "boxes": [[NAN, 0, 5, 5]]}]}, "expected finite pixel coordinates"),
    ("encode", {"inputs": [{"image": PICTURE, "boxes": [[70, 50, 90, 60]]}]}, "which lies outside its image"),
    ("encode", {"inputs": [{"image": "http://127.0.0.1/a.png"}]}, "is a URL, and fetching is off"),
    ("encode", {"inputs": [{"audio": "a.wav"}]}, "audio"),
    ("encode", {"inputs": [{"text": "a", "colour": "red"}]}, "colour"),
    ("encode", {"inputs": ["a"], "precision": "int3"}, "int3"),
    *[("index", given, outcome) for given, outcome in NO_INDEX],
    ("region captions", {"images": [PICTURE], "boxes": [None]}, "`boxes` holds None for an image; expected a list of"),
    ("embed_texts", {"texts": []}, "`texts` is empty; expected at least one text"),
    ("embed_texts", {"texts": ["\ud800"]}, "half a surrogate pair"),
    ("embed_texts", {"texts": ["a", "<image>", "", "a <image> b"]}, None),
    ("embed_fused", {"images": [PICTURE], "texts": []}, "`images` holds 1 entries; expected 0"),
    ("embed_fused", {"images": [PICTURE], "texts": ["<image>\nwhat?"]}, None),
    ("answer_from_memory", {"memory": torch.zeros(1, 1, 32), "questions": ["a", "b"]}, "1 memories"),
    ("answer_from_memory", {"memory": torch.zeros(1, 9, 32)}, r"`embedding_tokens` has shape \(1, 9, 32\); expected"),
    ("answer_from_memory", {"memory": torch.zeros(1, 1, 32), "questions": ["<image>\nwhat?"]}, None),
    ("similarity", {"query_embeds": torch.zeros(2, 3), "document_embeds": torch.zeros(2, 4)}, "3 dimensions, .* 4"),
    ("similarity", {"query_embeds": np.zeros((2, 3)), "document_embeds": PIXELS}, "`query_embeds` is a ndarray; ex"),
    ("similarity", {"query_embeds": torch.zeros(2, 3).double(), "document_embeds": torch.zeros(2, 3)}, "expected one"),
    ("similarity", {"query_embeds": torch.zeros(2, 0, 3), "document_embeds": torch.zeros(2, 0, 3)}, "at least one n"),
    ("similarity", {"query_embeds": torch.zeros(2), "document_embeds": torch.zeros(2)}, r"has shape \(2,\) and"),
    ("similarity", {"query_embeds": torch.zeros(2, 3), "document_embeds": torch.zeros(1, 2, 3)}, "expected"),
    ("set_embedding_tokens", (0, "mean"), "`num_embedding_tokens` is 0; expected a whole number of at least 1"),
    ("set_embedding_tokens", (-1, "mean"), "`num_embedding_tokens` is -1"),
    ("set_embedding_tokens", (2.0, "mean"), "'num_embedding_tokens' expected int, got float"),
    ("set_embedding_tokens", (2, "median"), "expected one of"),
    ("set_embedding_tokens", (252, "mean"), "4 beside 252 .*; expected room for a text in the 256 tokens"),
    ("set_embedding_prompt", ([],), r"`embedding_prompt_ids` is \[\]; expected token ids from 0 to 299"),
    ("set_embedding_prompt", ([300],), r"`embedding_prompt_ids` is \[300\]; expected token ids"),
    ("set_embedding_prompt", (["a"],), "embedding_prompt_ids"),
    ("set_embedding_prompt", ([True],), "embedding_prompt_ids"),
    ("config", {"num_visual_tokens": 5}, "`num_visual_tokens` is 5; expected a square"),
    ("config", {"num_visual_tokens": 0}, "`num_visual_tokens` is 0; expected a square"),
    ("config", {"num_visual_tokens": 256}, "256 beside 1 .*; expected room for a text in the 256 tokens"),
    ("config", {"projection_dim": 0}, "`projection_dim` is 0; expected a whole number"),
    ("config", {"projection_dim": 1.5}, "'projection_dim' expected int, got float"),
    ("config", {"projection_dim": True}, "'projection_dim' expected int, got bool"),
    ("config", {"num_visual_tokens": True}, "'num_visual_tokens' expected int, got bool"),
    ("config", {"embedding_prompt_ids": [True]}, "embedding_prompt_ids"),
    ("config", {"vision_grid": {"prefix_tokens": True}}, "vision_grid"),
    ("config", {"embedding_pooling": "max"}, "'embedding_pooling' expected one of"),
    ("config", {"text_attention": "none"}, "'text_attention' expected one of"),
    ("config", {"image_token_id": -1}, "`image_token_id` is -1; expected a token id, 0 or more"),
    ("config", {"image_token_id": 300}, "`image_token_id` is 300; expected one of the 300 tokens"),
    ("config", {"logit_scale_init_value": 99.0}, "`logit_scale_init_value` is 99.0; expected at most"),
    ("config", {"logit_scale_init_value": NAN}, "`logit_scale_init_value` is nan"),
    ("config", {"logit_bias_init_value": "low"}, "logit_bias_init_value"),
    ("config", {"prompts": ["query"]}, "'prompts'"),
    ("config", {"calibrated_modalities": ["smell"]}, "smell"),
    ("config", {"vision_grid": {}}, "`vision_grid` is {}"),
    ("config", {"num_embedding_tokens": 3}, None),
    ("arguments", {"caption_loss_weight": -1.0}, "`caption_loss_weight` is -1.0; expected 0 or more"),
    ("arguments", {"contrastive_loss_weight": NAN}, "`contrastive_loss_weight` is nan; expected 0 or more"),
    ("arguments", {"caption_loss_weight": 0.0, "contrastive_loss_weight": 0.0}, "are both 0; expected one above it"),
    ("arguments", {"grad_cache_chunk_size": 0}, "`grad_cache_chunk_size` is 0; expected 1 or more, or None"),
    ("arguments", {"ema_decay": 1.0}, "`ema_decay` is 1.0; expected a number between 0 and 1"),
    ("arguments", {"ema_decay": -0.1}, "`ema_decay` is -0.1; expected"),
    ("arguments", {"ema_decay": NAN}, "`ema_decay` is nan; expected"),
    ("arguments", {"per_device_train_batch_size": 1}, "`per_device_train_batch_size` is 1 on one process"),
    ("arguments", {"learning_rate": NAN}, "`learning_rate` is nan; expected"),
    ("arguments", {"learning_rate": -1.0}, "`learning_rate` is -1.0; expected"),
    ("arguments", {"no_argument": 1}, "no_argument"),
    ("arguments", {"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1; expected 0, as no loss reads it"),
    ("arguments", {"remove_unused_columns": True}, "`remove_unused_columns` is True; expected False, as the coll"),
    *[("arguments", {name: True}, f"`{name}` is True; expected a number") for name in [
        "max_steps", "save_steps", "learning_rate", "caption_loss_weight", "seed", "grad_cache_chunk_size",
    ]],
    ("arguments", {}, None),
]  # fmt: skip


def name_of(row) -> str:
    entry, given, _ = row
    values = given.values() if isinstance(given, dict) else given
    return f"{entry}-{'-'.join(map(shown, values))}".encode("ascii", "backslashreplace").decode()


def shown(value) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return str(tuple(value.shape))
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))[:30]  # each process has its own addresses


def numbers_in(result):
    """All floating-point tensors in what an entry point returns."""
    if isinstance(result, torch.Tensor | np.ndarray):
        result = torch.as_tensor(result)
        yield from [result] if result.is_floating_point() else []
    elif isinstance(result, ModelOutput | dict) or hasattr(result, "data"):
        yield from (number for value in dict(result).values() for number in numbers_in(value))
    elif isinstance(result, list | tuple):
        yield from (number for value in result for number in numbers_in(value))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
@torch.no_grad()
def test_nonsense_is_accepted_with_a_result_or_refused_by_name(tools, row):
    entry, given, outcome = row
    call = (
        (lambda: ENTRIES[entry](tools, **given)) if isinstance(given, dict) else lambda: ENTRIES[entry](tools, *given)
    )
    if outcome is None:
        assert all(number.isfinite().all() for number in numbers_in(call()))
        return
    with pytest.raises(REFUSALS, match=outcome):
        call()


@pytest.mark.parametrize(
    "asked", [{"max_new_tokens": 1000}, {"max_length": 1000, "max_new_tokens": None}, {}], ids=str
)
@torch.no_grad()
def test_writing_ends_where_the_language_model_does(asked):
    model = build_model(layers=1)
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = None, 400
    prompt = torch.full((2, 250), 20)
    mask = (torch.arange(250) >= torch.tensor([[0], [3]])).long()
    warned = pytest.warns(UserWarning, match="is 1000; writing ends before") if asked else nullcontext()
    with warned:
        written = model.generate(prompt, attention_mask=mask, do_sample=False, **asked)
    assert written.shape == (2, 256)
    memory = {"embedding_tokens": torch.zeros(1, 1, 32), "input_ids": prompt[:1], "do_sample": False}
    with pytest.warns(UserWarning, match="takes 256 tokens with the prompt") if asked else nullcontext():
        assert model.generate(**memory, **asked).shape == (1, 5)
