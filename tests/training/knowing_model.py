"""A model that knows every image by its pixels and every text by its meaning, and one that knows nothing."""

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from mmgem.training.scenes.caption_parser import parse_caption, parse_region_caption
from mmgem.training.scenes.captions import write_captions, write_edit
from mmgem.training.scenes.dataset import SceneDataset
from mmgem.training.scenes.drawing import COLORS, FILLS, PLACES, SHAPES, SIZES, draw_scene

PROMPTS = {"edit": "change: ", "object": "look at: "}
IMAGE_SIZE = 48


def knowable_rows(count: int) -> list[dict]:
    """Rows with all columns that are measured, and `twin_captions`, which a model has to know."""
    scenes = SceneDataset(8, count, image_size=IMAGE_SIZE, unique=True)
    rows = []
    for number in range(count):
        row, edit = dict(scenes[number]), write_edit(scenes.scene(number))
        row["edited_image"] = edit and draw_scene(edit.twin, IMAGE_SIZE)
        row["twin_captions"] = edit and write_captions(edit.twin)
        row["instructions"] = [{"text": f"number {box}", "box": box} for box in reversed(range(len(row["boxes"])))]
        rows.append(row)
    return rows


class WholeImages:
    """An image processor that crops nothing."""

    model_input_names = ["pixel_values"]

    def __call__(self, images, **kwargs):
        return {"pixel_values": torch.zeros(1, 3, images[0].height, images[0].width)}


class KnowingProcessor:
    """Images as their pixels, texts as their bytes; the image token is expanded to one byte of value 1."""

    image_token = "<image>"
    image_processor = WholeImages()
    vlm_processor = None
    is_plain, prompt_kwargs, allow_urls = True, {}, False
    pad_token_id = 0

    def check_proportions(self, size, name):
        pass

    def prompt(self, text="", num_images=1):
        return self.image_token * num_images + text

    def plain_text(self, text):
        return text

    @property
    def tokenizer(self):
        return self

    def __call__(self, images=None, text=None, boxes=None, padding=True, return_tensors="pt"):
        inputs = {}
        if images is not None:
            inputs["pixel_values"] = torch.stack([torch.from_numpy(np.array(image)).float() for image in images])
        if boxes is not None:
            padded = torch.zeros(len(boxes), max(map(len, boxes)), 4)
            for row, own in zip(padded, boxes, strict=True):
                row[: len(own)] = torch.tensor(own)
            inputs["boxes"] = padded
        if text is not None and not padding:
            inputs["input_ids"] = [list(sample.encode()) for sample in text]
        elif text is not None:
            inputs["input_ids"] = self.encode([sample.replace("<image>", "\1") for sample in text])
            inputs["attention_mask"] = (inputs["input_ids"] != self.pad_token_id).long()
        return inputs

    def encode(self, texts):
        rows = [torch.tensor(list(text.encode()), dtype=torch.long) for text in texts]
        return pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)

    def batch_decode(self, ids, skip_special_tokens=True):
        return [bytes(value for value in row if value != self.pad_token_id).decode() for row in ids.tolist()]


class KnowingModel(torch.nn.Module):
    """Its memory of an image is the number of the row, in the first of two vectors: all metrics must be 1.

    Args:
        rows: of `knowable_rows`.

    Attributes:
        calls: for each call the name of the method and how many images, texts or memories it was given.
    """

    device, dtype, vlm = torch.device("cpu"), torch.float32, None
    generation_config = GenerationConfig(use_cache=False)  # it has no keys and values

    def __init__(self, rows):
        super().__init__()
        self.config = SimpleNamespace(
            prompts=PROMPTS, has_memory=True, embedded_kinds=["text", "image", "fused"], calibrated_modalities=None
        )
        self.config.grid = SimpleNamespace(stride=(1, 1))
        self.row_list = rows
        self.rows = {self._key(np.array(row["image"])): row for row in rows}
        twins = [row for row in rows if row.get("edited_image")]
        self.rows |= {self._key(np.array(row["edited_image"])): {"captions": row["twin_captions"]} for row in twins}
        self.text_batches = []
        self.calls = []

    @staticmethod
    def _key(pixels):
        return np.asarray(pixels, dtype=np.uint8).tobytes()

    def _rows(self, pixel_values):
        return [self.rows[self._key(pixels.numpy())] for pixels in pixel_values]

    def _called(self, method, count):
        assert not self.training and torch.is_inference_mode_enabled()
        self.calls.append((method, count))

    def _embed(self, text):
        """One number for each object there could be, and some for the subject's color and shape."""
        objects, look = parse_caption(text), parse_region_caption(text)
        vector = torch.zeros(len(SHAPES), len(COLORS), len(FILLS), len(SIZES), len(PLACES) + 2)
        for item in objects or ():
            vector[self._position(item) + (PLACES.index(item.place),)] = 1
            if item.size == "large":
                vector[SHAPES.index(item.shape), COLORS.index(item.color), 0, 0, -1] = 0.1
        if text.startswith("a picture"):
            vector[SHAPES.index(look.shape), COLORS.index(look.color), 0, 0, -1] = 1
        elif look:
            vector[self._position(look) + (-2,)] = 1
        return vector.flatten()

    @staticmethod
    def _position(look):
        return SHAPES.index(look.shape), COLORS.index(look.color), FILLS.index(look.fill), SIZES.index(look.size)

    def _embed_fused(self, row, text):
        """What an instruction makes of an image; of a text that is none of the row's own, a KeyError."""
        texts = {"": row["captions"][0]}
        if row.get("twin_captions"):
            texts[(self.config.prompts or {}).get("edit", "") + row["edit"]["instruction"]] = row["twin_captions"][0]
        for one in row.get("instructions") or []:
            named = row["region_captions"][one["box"]]
            texts[(self.config.prompts or {}).get("object", "") + one["text"]] = named
        return self._embed(texts[text])

    def get_image_features(self, pixel_values, boxes=None):
        self._called("get_image_features", len(pixel_values))
        rows = self._rows(pixel_values)
        if boxes is None:
            embeds = torch.stack([3 * self._embed(row["captions"][0]) for row in rows])
            return _Output(embeds, pixel_values)  # as the visual tokens
        regions = [torch.stack([self._embed(text) for text in row["region_captions"]]) for row in rows]
        regions = pad_sequence(regions, batch_first=True)
        assert regions.shape[:2] == boxes.shape[:2]
        return _Output(regions)

    def similarity_map(self, pixel_values, query_embeds, num_vectors=None):
        """Shares in a heap around the middle of the box that a query is of."""
        [row] = self._rows(pixel_values)
        own = torch.stack([self._embed(text) for text in row["region_captions"]])
        x0, y0, x1, y1 = torch.tensor(row["boxes"])[(query_embeds @ own.T).argmax(dim=1)].T[
            ..., None, None
        ]  # (T, 1, 1)
        place = torch.arange(IMAGE_SIZE) + 0.5
        distances = (place - (x0 + x1) / 2) ** 2 + (place[:, None] - (y0 + y1) / 2) ** 2
        return torch.exp(-distances / 9)[None]

    def get_text_features(self, input_ids, attention_mask):
        self._called("get_text_features", len(input_ids))
        self.text_batches.append(attention_mask)
        return _Output(torch.stack([self._embed(text) for text in KnowingProcessor().batch_decode(input_ids)]))

    def get_multimodal_features(self, input_ids, attention_mask, pixel_values=None, visual_tokens=None):
        self._called("get_multimodal_features", len(input_ids))
        pixel_values = visual_tokens if pixel_values is None else pixel_values
        rows, texts = self._rows(pixel_values), self._texts_after_images(input_ids)
        embeds = torch.stack([7 * self._embed_fused(row, text) for row, text in zip(rows, texts, strict=True)])
        memory = torch.zeros(len(rows), 2, 4)
        memory[:, 0, 0] = torch.tensor([self.row_list.index(row) for row in rows])
        return _Output(embeds, memory)

    def generate(
        self,
        input_ids,
        attention_mask,
        pixel_values=None,
        boxes=None,
        embedding_tokens=None,
        max_new_tokens=None,
        do_sample=None,
        visual_tokens=None,
    ):
        method = "recall" if embedding_tokens is not None else "generate" if boxes is None else "describe regions"
        self._called(method, len(input_ids))
        assert do_sample is False
        if embedding_tokens is not None:
            assert pixel_values is None and boxes is None and not (input_ids == 1).any()
            rows = [self.row_list[int(number)] for number in embedding_tokens[:, 0, 0]]
            questions = KnowingProcessor().batch_decode(input_ids)
            return KnowingProcessor().encode(map(self._answer, rows, questions))
        pixel_values = visual_tokens if pixel_values is None else pixel_values
        rows, questions = self._rows(pixel_values), self._texts_after_images(input_ids)
        texts = map(self._answer, rows, questions)
        if boxes is not None:
            assert not any(questions)
            texts = [text for row in rows for text in row["region_captions"]]
        return torch.cat([input_ids, KnowingProcessor().encode(texts)], dim=1)

    @staticmethod
    def _texts_after_images(input_ids):
        texts = KnowingProcessor().batch_decode(input_ids)
        assert all(text.count("\1") == 1 and text.startswith("\1") for text in texts)
        return [text[1:] for text in texts]

    def _answer(self, row, question):
        answers = {turn["question"]: f"{turn['answer'].upper()}!" for turn in row.get("qa") or []}
        return (answers | {"": row["captions"][-1]})[question]


class IgnorantModel(KnowingModel):
    """Sees the same in every image and says the same of it."""

    def get_image_features(self, pixel_values, boxes=None):
        output = super().get_image_features(pixel_values, boxes)
        return _Output(torch.ones_like(output.pooler_output), output.last_hidden_state)

    def similarity_map(self, pixel_values, query_embeds, num_vectors=None):
        shares = torch.zeros(1, len(query_embeds), IMAGE_SIZE, IMAGE_SIZE)
        shares[..., 0, 0] = 1
        return shares

    def _embed_fused(self, row, text):
        return torch.ones_like(super()._embed_fused(row, text))

    def _answer(self, row, question):
        return "a picture of a cat"

    def generate(self, input_ids, embedding_tokens=None, **kwargs):
        new = KnowingProcessor().encode(["a picture of a cat"] * len(input_ids))
        return new if embedding_tokens is not None else torch.cat([input_ids, new], dim=1)


class _Output:
    def __init__(self, pooler_output, last_hidden_state=None):
        self.pooler_output, self.last_hidden_state = pooler_output, last_hidden_state
