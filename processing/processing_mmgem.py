"""The processor: images, texts and boxes in, tensors out."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER, AddedToken

from .boxes import boxes_in_view, check_boxes, model_views
from .image_loading import load_image

# A conversation is its contents, one after the other, each answer closed by the end token: no role markers, so that an
# image alone asks for a caption and an image followed by a question asks for its answer.
CHAT_TEMPLATE = (
    "{%- macro contents(message) -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}IMAGE_TOKEN"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- contents(message) -}}{{- eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- contents(message) -}}{%- endif -%}"
    "{%- endfor -%}"
)


class MMGEMImagesKwargs(ImagesKwargs, total=False):
    """What goes with the images: `boxes`, in pixels, besides what every image processor takes."""

    boxes: object


class MMGEMProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of `MMGEMProcessor.__call__`, by the part they belong to."""

    images_kwargs: MMGEMImagesKwargs  # type: ignore[misc]


class MMGEMProcessor(ProcessorMixin):
    """Turns images, texts and boxes into the inputs of `MMGEMModel`.

    In a text, `<image>` stands for an image, or for one box of it, and becomes as many image tokens as the language
    model gets visual tokens. The prompt of a caption is `"<image>"`, that of an answer `"<image>"` and the question.

    Args:
        image_processor: The vision tower's, for `(B, 3, H, W)` pixel values.
        tokenizer: The language model's; it must have a padding token and `image_token` in its vocabulary.
        num_visual_tokens: Image tokens for one image or box, as in the model's config.
        image_token: The placeholder.
        chat_template: Jinja; by default the contents of all messages, one after the other.

    Raises:
        ValueError: The tokenizer lacks one of the tokens, or `num_visual_tokens` is not positive.
    """

    valid_processor_kwargs = MMGEMProcessorKwargs  # type: ignore[assignment]

    def __init__(self, image_processor, tokenizer, num_visual_tokens, image_token="<image>", chat_template=None):
        if not isinstance(num_visual_tokens, int) or num_visual_tokens < 1:
            raise ValueError(f"`num_visual_tokens` is {num_visual_tokens!r}; expected a positive integer.")
        if image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"`image_token` is {image_token!r}, which the tokenizer does not know; expected a token of it. Use "
                "`MMGEMProcessor.from_towers`, or add it with `tokenizer.add_tokens` as a special token."
            )
        if tokenizer.pad_token is None:
            raise ValueError("`tokenizer` has no `pad_token`; expected one, which may be the same as `eos_token`.")
        # Causal language models know no token types, but it is the default of a tokenizer to produce them.
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        self.num_visual_tokens = num_visual_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        chat_template = chat_template or CHAT_TEMPLATE.replace("IMAGE_TOKEN", image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_towers(
        cls,
        vision,
        text,
        num_visual_tokens: int,
        num_embedding_tokens: int = 1,
        image_token: str = "<image>",
        gguf_file: str | None = None,
    ) -> "MMGEMProcessor":
        """Composes the processor of a vision checkpoint and the tokenizer of a language model.

        `image_token` is added to the vocabulary (the model's embeddings must grow with it); a missing padding token
        becomes the end token; padding goes to the left, as generation needs it (embeddings do not depend on it). Texts
        are truncated so that the image tokens before them, and the model's [EMB] vectors or the end token after them,
        still fit.

        Args:
            vision: Name or folder of a checkpoint with an image processor, or the image processor.
            text: Name or folder of a checkpoint with a tokenizer, or the tokenizer, whose `model_max_length` is then
                what the language model takes.
            num_visual_tokens: Image tokens for one image or box.
            num_embedding_tokens: [EMB] vectors of the model.
            image_token: The placeholder.
            gguf_file: File in the folder `text` to read the tokenizer from.

        Raises:
            ValueError: If the language model has no room for a text beside the image tokens.
        """
        if isinstance(vision, (str, os.PathLike)):
            vision = AutoImageProcessor.from_pretrained(vision, backend="pil")
        if isinstance(text, (str, os.PathLike)):
            gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
            config = AutoConfig.from_pretrained(text, **gguf).get_text_config()
            text = AutoTokenizer.from_pretrained(text, **gguf)
            # Many tokenizers know no limit, or not that of their model.
            limit = getattr(config, "max_position_embeddings", None) or LARGE_INTEGER
            text.model_max_length = min(text.model_max_length, limit)
        if text.model_max_length < LARGE_INTEGER:
            room = text.model_max_length - num_visual_tokens - max(1, num_embedding_tokens)
            if room < 1:
                raise ValueError(
                    f"`num_visual_tokens` is {num_visual_tokens}; expected fewer, so that a text fits after them into "
                    f"the {text.model_max_length} tokens that the language model takes."
                )
            text.model_max_length = room
        text.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        if text.pad_token is None:
            text.pad_token = text.eos_token
        text.padding_side = text.init_kwargs["padding_side"] = "left"  # only what is in `init_kwargs` is saved
        return cls(vision, text, num_visual_tokens=num_visual_tokens, image_token=image_token)

    @property
    def text_defaults(self) -> dict:
        """Defaults for the tokenizer: rows padded to the longest, cut to what the model takes where that is known."""
        return {"padding": True, "truncation": self.tokenizer.model_max_length < LARGE_INTEGER}

    @property
    def model_input_names(self) -> list[str]:
        """`input_ids`, `attention_mask`, `pixel_values`, `boxes`."""
        return [*super().model_input_names, "boxes"]

    def __call__(self, images=None, text=None, boxes=None, **kwargs) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: One picture or a list of them (lists of lists are flattened), each of a kind `load_image` takes; or
                a batch of them as a 4-dimensional array or tensor.
            text: A string or a list of strings, with as many `<image>` in all as there are images, or as there are
                boxes; or without any, where texts and images are to be compared.
            boxes: For each image a list of absolute `[x0, y0, x1, y1]` in pixels of the image as displayed, for each
                of which the model then sees that region instead of the image. Clipped to the image. With as many
                `<image>` as images, the one of image i becomes the tokens of all its boxes.
            kwargs: `return_tensors="pt"`, `padding`, `truncation`, `max_length`, `images_kwargs` and whatever else
                tokenizers and image processors take.

        Returns:
            `input_ids` and `attention_mask` (B, L) int64; L is 0 if all texts are empty and the tokenizer adds no
            token. `pixel_values` (N, 3, H, W) float32; of an image processor that keeps the aspect ratio (SigLIP 2
            NaFlex) patches, (N, P, patch * patch * 3), with `spatial_shapes` (N, 2). `boxes` (N, R, 4) float32, in
            [0, 1] of the pixel values, all zeros where an image has fewer than R boxes.

        Raises:
            FileNotFoundError, TypeError, ValueError: An input that cannot be used, see `load_image` and `check_boxes`;
                an empty batch; placeholders without images or images without placeholders; truncation that would cut
                image tokens.
        """
        if boxes is not None:
            kwargs["boxes"] = boxes
        if text is not None:
            given = {**kwargs, **kwargs.get("text_kwargs", {})}
            kwargs |= {name: value for name, value in self.text_defaults.items() if name not in given}
        limit = self.tokenizer.model_max_length
        if images is not None and text is not None and limit < LARGE_INTEGER and not _has_max_length(kwargs):
            # The limit is that of a text after an image, and here the image tokens are part of the text.
            texts = [text] if isinstance(text, str) else text
            if any(isinstance(sample, str) and self.image_token in sample for sample in texts):
                kwargs["max_length"] = limit + self.num_visual_tokens
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Texts as a list, images as a flat list of RGB images. See `__call__`."""
        if text is not None:
            text = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
        if images is not None:
            images = _flatten(images)
            if not images:
                raise ValueError("`images` is empty; expected at least one image, or None.")
            images = [load_image(image, f"images[{i}]") for i, image in enumerate(images)]
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, boxes=None, **kwargs):
        """Refuses an empty batch, texts that are no strings, and boxes without images. See `__call__`."""
        if videos is not None or audio is not None:
            raise ValueError("`videos` or `audio` was given; expected only images and texts.")
        if images is None and text is None:
            raise ValueError("`images` and `text` are both None; expected at least one of them.")
        if text is not None and not text:
            raise ValueError("`text` is an empty list; expected at least one text, or None.")
        for i, sample in enumerate(text or []):
            if not isinstance(sample, str):
                raise TypeError(f"`text[{i}]` is a {type(sample).__name__}, {sample!r:.100}; expected a string.")
        if boxes is not None and images is None:
            raise ValueError("`boxes` was given without `images`; expected the images they lie in.")

    def _process_images(self, images, boxes=None, **kwargs):
        features = self.image_processor(images, **kwargs)
        shapes = [pixels.shape for pixels in features["pixel_values"]]
        is_patches = "spatial_shapes" in features  # (P, patch * patch * 3) of each image
        if any(len(shape) != (2 if is_patches else 3) for shape in shapes):
            raise ValueError(
                f"`image_processor` is a {type(self.image_processor).__name__}, which makes pixel values of shape "
                f"{tuple(shapes[0])} of an image; expected (3, H, W)."
            )
        units = [1] * len(images)
        if boxes is not None:
            sizes = [image.size for image in images]
            boxes = check_boxes(boxes, sizes)
            view_sizes = [tuple(shape[:0:-1]) for shape in shapes]
            features["boxes"] = boxes_in_view(boxes, model_views(self.image_processor, sizes, view_sizes, **kwargs))
            units = [len(row) for row in boxes]
        return features, [self.replace_image_token() * count for count in units]

    def replace_image_token(self, image_inputs: dict | None = None, image_idx: int = 0, **kwargs) -> str:
        """What one placeholder becomes: the image tokens of one image or box."""
        return self.image_token * self.num_visual_tokens

    def get_text_with_replacements(self, text, images_replacements=(), *others):
        """Expands the placeholders, one for each image or, where there are as many, one for each box."""
        # The parent knows which placeholders count: not those it was told to read as plain text.
        present = sum(sample.count(self.image_token) for sample in text)
        _, found = super().get_text_with_replacements(list(text), [""] * present)
        placeholders = sum(map(len, found))

        unit = self.replace_image_token()
        units = len("".join(images_replacements)) // len(unit)
        if placeholders not in (0, len(images_replacements), units):
            boxes = "" if units == len(images_replacements) else f" with {units} boxes"
            raise ValueError(
                f"`text` has {placeholders} {self.image_token} placeholders for {len(images_replacements)} "
                f"images{boxes}; expected one for each image{' or for each box' if boxes else ''}, or none to compare "
                "texts and images."
            )
        if placeholders != len(images_replacements):
            images_replacements = [unit] * units
        return super().get_text_with_replacements(text, images_replacements, *others)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Image tokens of images of these sizes, which do not matter here."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_visual_tokens] * count, num_image_patches=[1] * count)


def _has_max_length(kwargs: dict) -> bool:
    return "max_length" in kwargs or "max_length" in kwargs.get("text_kwargs", {})


def _flatten(images) -> list:
    """One picture, a (nested) list of them or a 4-dimensional array, as a flat list."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray)):
        return [picture for item in images for picture in _flatten(item)]
    return [images]


MMGEMProcessor.register_for_auto_class()
