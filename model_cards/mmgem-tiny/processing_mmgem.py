"""The processor: images, texts and boxes in, tensors out."""

import copy
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import groupby
from json import JSONDecodeError
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import LARGE_INTEGER, AddedToken

from .boxes import boxes_in_view, check_boxes, model_views
from .image_loading import MAX_PIXELS, load_image
from .url_fetching import AllowedURLs

if TYPE_CHECKING:
    # The Hub folder carries the module of sentence-transformers because it stands here: files are collected by their
    # imports. It is not imported.
    from .sentence_transformers_mmgem import MMGEMTransformer  # noqa: F401

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


VLM_FOLDER = "vlm_processor"  # in the folder of the processor, where the model began as a VLM
# What image processors of VLMs cut an image into several by, and what keeps it in one piece.
WHOLE_IMAGE = {"do_image_splitting": False, "crop_to_patches": False, "do_pan_and_scan": False}
# Arguments of a call that tokenizers keep, save, and take for their defaults when they are loaded.
CALL_SETTINGS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
MAX_RESIZED_PIXELS = 1 << 24  # of a picture, before its middle is cut out
MAX_TOKENS = 1 << 20  # of a text, in a call that says how many
WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision")  # to load from


# Before the chat template of a language model, which may know only texts: images become placeholders in them.
TEXT_CONTENTS = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set text.value = text.value + 'IMAGE_TOKEN' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set text.value = text.value + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)

logger = logging.getLogger(__name__)

_tokenizing = RLock()


def _renew_lock():
    global _tokenizing
    _tokenizing = RLock()  # the thread that held it is not in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class MMGEMImagesKwargs(ImagesKwargs, total=False):
    """What goes with the images: `boxes`, in pixels, besides what every image processor takes."""

    boxes: object


class MMGEMInputs(BatchFeature):
    """A batch, whose boxes keep their precision: bfloat16 has no more than 256 places along an image."""

    def to(self, *args, **kwargs) -> "MMGEMInputs":
        """As of every batch; a type is for the pixels alone."""
        boxes = self.get("boxes")
        super().to(*args, **kwargs)
        if isinstance(boxes, torch.Tensor):
            self.data["boxes"] = boxes.to(self.data["boxes"].device)
        return self


class MMGEMProcessorKwargs(ProcessingKwargs, total=False):
    """Arguments of `MMGEMProcessor.__call__`, by the part they belong to."""

    images_kwargs: MMGEMImagesKwargs  # type: ignore[misc]


class MMGEMProcessor(ProcessorMixin):
    """Turns images, texts and boxes into the inputs of `MMGEMModel`.

    In a text, `<image>` stands for an image, or for one box of it, and becomes as many image tokens as the language
    model gets visual tokens. The prompt of a caption is `"<image>"`, that of an answer `"<image>"` and the question.

    `tokenizer.model_max_length` says how long a text may be, beside one image, and is saved. Longer ones are cut; the
    first is logged, and `cut_texts` counts them. What a call says otherwise holds for this call.

    Pictures that are given as URLs are fetched only after `processor.allow_urls = True`, or a list of hosts, see
    `load_image`. It is not saved.

    Args:
        image_processor: The vision tower's, for `(B, 3, H, W)` pixel values.
        tokenizer: The language model's; it must have a padding token and `image_token` in its vocabulary.
        num_visual_tokens: Image tokens for one image or box, as in the model's config.
        image_token: The placeholder.
        chat_template: Jinja; by default the contents of all messages, one after the other.
        vlm_processor: Of the VLM that the model began as, see `from_vlm`. What texts with placeholders and images,
            but without boxes, become is its work then, with all that its model asks for.

    Raises:
        ValueError: The tokenizer lacks one of the tokens, or `num_visual_tokens` is not positive.
    """

    valid_processor_kwargs = MMGEMProcessorKwargs  # type: ignore[assignment]
    allow_urls: AllowedURLs

    def __init__(
        self,
        image_processor,
        tokenizer,
        num_visual_tokens,
        image_token="<image>",
        chat_template=None,
        vlm_processor=None,
    ):
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
        _forget_calls(tokenizer)
        self.cut_texts = 0
        self.allow_urls = False  # of this process, and not saved
        self.num_visual_tokens = num_visual_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.vlm_processor = vlm_processor
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
        still fit. The chat template of an instruct model is kept, see `prompt`.

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
            text.model_max_length = min(text.model_max_length, _limit_of(config))
        text.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
        _prepare_tokenizer(text, num_visual_tokens, num_embedding_tokens)
        chat_template = text.chat_template
        if chat_template is not None:
            if isinstance(chat_template, dict):
                chat_template = chat_template["default"]
            chat_template = TEXT_CONTENTS.replace("IMAGE_TOKEN", image_token) + chat_template
        return cls(
            vision, text, num_visual_tokens=num_visual_tokens, image_token=image_token, chat_template=chat_template
        )

    @classmethod
    def from_vlm(cls, vlm, num_visual_tokens: int, num_embedding_tokens: int = 1) -> "MMGEMProcessor":
        """The processor of a model that begins as a VLM, with the VLM's own inside, as it is.

        An image alone, to be embedded, is seen whole: where the VLM cuts images into tiles, it does so for prompts.

        Args:
            vlm: Name or folder of a VLM, or its processor.
            num_visual_tokens: Image tokens for one box.
            num_embedding_tokens: [EMB] vectors of the model.

        Raises:
            ValueError: If the image processor of the VLM gives no (3, H, W) pixels of a whole image.
        """
        limit = LARGE_INTEGER
        if isinstance(vlm, (str, os.PathLike)):
            config, vlm = AutoConfig.from_pretrained(vlm).get_text_config(), AutoProcessor.from_pretrained(vlm)
            limit = _limit_of(config)
        image_processor, tokenizer = copy.deepcopy(vlm.image_processor), copy.deepcopy(vlm.tokenizer)
        for name, value in WHOLE_IMAGE.items():
            if hasattr(image_processor, name):
                setattr(image_processor, name, value)
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        processor = cls(
            image_processor,
            tokenizer,
            num_visual_tokens=num_visual_tokens,
            image_token=vlm.image_token,
            chat_template=vlm.chat_template,
            vlm_processor=vlm,
        )
        _prepare_tokenizer(
            tokenizer, max(num_visual_tokens, len(processor._whole_image_ids("", 1))), num_embedding_tokens
        )
        return processor

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "MMGEMProcessor":
        """As of every processor, with the VLM's own where there is one.

        Raises:
            ValueError: If a file of it is damaged, and as every processor.
        """
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:  # of any kind: that of tokenizers is no other
            if isinstance(error, OSError | ImportError | ValueError) and not isinstance(error, JSONDecodeError):
                raise
            raise ValueError(
                f"`processor` is {str(pretrained_model_name_or_path)!r}, which cannot be read ({error}); expected a "
                "whole and undamaged checkpoint."
            ) from error
        if isinstance(processor.vlm_processor, str):
            where = {name: kwargs[name] for name in WHERE if name in kwargs}
            processor.vlm_processor = AutoProcessor.from_pretrained(
                pretrained_model_name_or_path, subfolder=processor.vlm_processor, **where
            )
        return processor

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As of every processor, with the VLM's own in a folder of its own, where there is one."""
        _forget_calls(self.tokenizer)
        if self.vlm_processor is None:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        saved = super().save_pretrained(save_directory)
        _forget_calls(self.vlm_processor.tokenizer)
        self.vlm_processor.save_pretrained(Path(save_directory, VLM_FOLDER))
        if push_to_hub:  # only now, when all is there
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved

    def to_dict(self) -> dict:
        """As saved: of the VLM's processor where it is."""
        vlm_processor, self.vlm_processor = self.vlm_processor, None if self.vlm_processor is None else VLM_FOLDER
        try:
            content = super().to_dict()
        finally:
            self.vlm_processor = vlm_processor
        if vlm_processor is None:
            content.pop("vlm_processor", None)
        return content

    # Prompts, in one place for training and for whoever generates

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a chat template with turns, and not just one content after the other."""
        return self.chat_template != CHAT_TEMPLATE.replace("IMAGE_TOKEN", self.image_token)

    @property
    def is_plain(self) -> bool:
        """Whether a prompt is its images and its text, and nothing else."""
        return not self.has_chat_template and self.vlm_processor is None

    def prompt(self, text: str = "", num_images: int = 1) -> str:
        """The text that an answer follows: of a base model the images and the text, of an instruct model, through its
        chat template, the turn of a user with them.

        Args:
            text: A question or an instruction; an empty one asks for a caption.
            num_images: Images that stand before it.

        Returns:
            The prompt with a placeholder for each image. Give it to the processor with `prompt_kwargs`.
        """
        text = self.plain_text(text)
        if not self.has_chat_template:
            return self.image_token * num_images + text
        return self._conversation([_user_turn(text, num_images)], add_generation_prompt=True)

    def plain_text(self, text: str) -> str:
        """A text of a person or of data in which no placeholder stands for an image, as if it were typed.

        Args:
            text: Questions of LLaVA's data begin or end with a placeholder; there it goes, with the space around it.
                Anywhere else it becomes the word in it.

        Raises:
            TypeError: If it is no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"`text` is a {type(text).__name__}, {text!r:.80}; expected a string.")
        if self.image_token not in text:
            return text
        place = re.escape(self.image_token)
        kept = re.sub(rf"^(?:\s*{place}\s*)+|(?:\s*{place}\s*)+$", "", text)
        return (kept or text.strip()).replace(self.image_token, self.image_token.strip("<>"))

    def _conversation(self, messages: list[dict], **kwargs) -> str:
        """In the chat template; of models that think before they answer, without."""
        if "enable_thinking" in str(self.chat_template):
            kwargs["enable_thinking"] = False
        return self.apply_chat_template(messages, **kwargs)

    @property
    def prompt_kwargs(self) -> dict:
        """What the processor has to know of texts that `prompt` made: whether [BOS] and the like are still to come."""
        if not self.has_chat_template:
            return {}
        bos_token = self.tokenizer.bos_token
        writes_bos = bool(bos_token) and self.prompt().startswith(bos_token)
        # The chat templates of VLMs leave them to the processor, those of language models write all themselves.
        return {"add_special_tokens": self.vlm_processor is not None and not writes_bos}

    def prompt_ids(self, text: str = "", num_images: int = 1, is_vlm_view: bool = True) -> list[int]:
        """The tokens of a prompt, with one image token for each image, whose place the joint step of training fills.

        Args:
            text, num_images: As for `prompt`.
            is_vlm_view: Whether a VLM sees whole images in its way, with the tokens that it puts around them, and not
                boxes or memories.
        """
        prompt = self.prompt(text, num_images)
        if self.vlm_processor is None or not is_vlm_view or not num_images:
            prompt = prompt.replace(self.image_token, self.visual_token)
            return self._tokenize(prompt, **self.prompt_kwargs)
        ids, token_id = (
            self._whole_image_ids(text, num_images),
            self.tokenizer.convert_tokens_to_ids(self.visual_token),
        )
        length, kept = ids.count(token_id) // num_images, []
        for token, run in groupby(ids):
            count = len(list(run))
            kept += [token] * (count // length if token == token_id else count)
        return kept

    def _whole_image_ids(self, text: str, num_images: int) -> list[int]:
        """A prompt as the VLM's processor tokenizes it for images that it leaves in one piece."""
        whole = {name: value for name, value in WHOLE_IMAGE.items() if hasattr(self.image_processor, name)}
        blank, prompts = [Image.new("RGB", (64, 64))] * num_images, [self.prompt(text, num_images)]
        inputs = self._vlm_inputs(blank, prompts, **self.prompt_kwargs, images_kwargs=whole)
        return [int(token) for token in inputs["input_ids"][0]]

    def answer_ids(self, answer: str, text: str = "", num_images: int = 1) -> list[int]:
        """The tokens of an answer to a prompt, with those that end the turn of a chat template.

        Args:
            answer: The answer.
            text, num_images: Of the prompt, see `prompt`.

        Raises:
            ValueError: If a conversation in the chat template does not begin with the prompt that it asks with.
        """
        if not self.has_chat_template:
            return self._tokenize(answer, add_special_tokens=False)
        prompt, turn = self.prompt(text, num_images), {"type": "text", "text": answer.strip()}
        conversation = [_user_turn(text, num_images), {"role": "assistant", "content": [turn]}]
        whole = self._conversation(conversation)
        if not whole.startswith(prompt):
            raise ValueError(
                f"`chat_template` writes {prompt!r:.200} to ask for an answer, but {whole!r:.200} where it is given; "
                "expected a conversation that begins with its prompt."
            )
        whole = whole.rstrip()  # what stands after the end of the turn, nobody writes
        before, ids = (self._tokenize(part, add_special_tokens=False) for part in (prompt, whole))
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self._tokenize(whole[len(prompt) :], add_special_tokens=False)

    def _tokenize(self, text: str, **kwargs) -> list[int]:
        """Token ids. A fast tokenizer keeps in itself how a call pads and cuts: threads would get each other's."""
        with _tokenizing:
            return self.tokenizer(text, **kwargs)["input_ids"]

    @property
    def visual_token(self) -> str:
        """The token that the model sees in the place of an image; Gemma 3 has another one in its prompts."""
        if self.vlm_processor is None:
            return self.image_token
        return self.tokenizer.convert_ids_to_tokens(self.vlm_processor.image_token_ids[0])

    @property
    def text_defaults(self) -> dict:
        """Defaults for the tokenizer: rows padded to the longest, cut to what the model takes where that is known."""
        return {"padding": True, "truncation": self.text_limit < LARGE_INTEGER}

    @property
    def text_limit(self) -> int:
        """How many tokens a text may have, beside one image: `model_max_length` of the tokenizer.

        Raises:
            ValueError: If that is no whole number of at least 1, nor None.
        """
        limit = self.tokenizer.model_max_length
        if limit is None:
            return LARGE_INTEGER
        if isinstance(limit, bool) or not isinstance(limit, int | float) or limit < 1 or limit != int(limit):
            raise ValueError(f"`model_max_length` is {limit!r}; expected a whole number of at least 1.")
        return int(limit)

    @property
    def model_input_names(self) -> list[str]:
        """`input_ids`, `attention_mask`, `pixel_values`, `boxes`, and what else a VLM takes."""
        of_vlm = [] if self.vlm_processor is None else self.vlm_processor.model_input_names
        return list(dict.fromkeys([*super().model_input_names, "boxes", *of_vlm]))

    def __call__(self, images=None, text=None, boxes=None, **kwargs) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: One picture or a list of them (lists of lists are flattened), each of a kind `load_image` takes; or
                a batch of them as a 4-dimensional array or tensor. An object that comes several times is prepared
                once.
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
            [0, 1] of the pixel values, all zeros where an image has fewer than R boxes. Of a VLM's prompts what its
            own processor returns, padded on the left. `.to(dtype)` is for the pixels; boxes stay in float32.

        Raises:
            FileNotFoundError, TypeError, ValueError: An input that cannot be used, see `load_image` and `check_boxes`;
                an empty batch; placeholders without images or images without placeholders; truncation that would cut
                image tokens.
        """
        for name in ("images_kwargs", "text_kwargs"):
            if not isinstance(kwargs.get(name, {}), Mapping):
                raise TypeError(f"`{name}` is {kwargs[name]!r:.100}; expected a mapping of arguments.")
        _check_lengths({**kwargs, **kwargs.get("text_kwargs", {})})
        check_views({**kwargs, **kwargs.get("images_kwargs", {})})
        if boxes is not None:
            kwargs["boxes"] = boxes
        elif self.vlm_processor is not None and images is not None and self._has_placeholders(text):
            return self._vlm_inputs(images, text, **kwargs)
        if text is not None:
            given = {**kwargs, **kwargs.get("text_kwargs", {})}
            defaults = self.text_defaults | ({"truncation": True} if _has_max_length(kwargs) else {})
            kwargs |= {name: value for name, value in defaults.items() if name not in given}
        limit = self.text_limit
        if images is not None and text is not None and limit < LARGE_INTEGER and not _has_max_length(kwargs):
            # The limit is that of a text after an image, and here the image tokens are part of the text.
            texts = [text] if isinstance(text, str) else text
            if any(isinstance(sample, str) and self.image_token in sample for sample in texts):
                kwargs["max_length"] = limit + self.num_visual_tokens
        with nullcontext() if text is None else _tokenizing:
            return MMGEMInputs(super().__call__(images=images, text=text, **kwargs).data)

    def _has_placeholders(self, text) -> bool:
        texts = [text] if isinstance(text, str) else list(text or [])
        return any(isinstance(sample, str) and self.image_token in sample for sample in texts)

    def _vlm_inputs(self, images, text, **kwargs) -> BatchFeature:
        """Prompts as the VLM's own processor prepares them."""
        images, text, _, _ = self.prepare_inputs_layout(images, text)
        self.validate_inputs(images, text)
        counts = [sample.count(self.image_token) for sample in text]
        if sum(counts) != len(images):
            raise ValueError(
                f"`text` has {sum(counts)} {self.image_token} placeholders for {len(images)} images; expected one for "
                "each image, or none to compare texts and images."
            )
        for number, image in enumerate(images):
            self.check_proportions(image.size, f"images[{number}]")
        rest = iter(images)
        of_text = [[next(rest) for _ in range(count)] for count in counts]
        defaults = {"padding": True, "padding_side": "left"}
        bos_token = self.tokenizer.bos_token
        if bos_token and all(sample.startswith(bos_token) for sample in text):
            defaults["add_special_tokens"] = False  # a chat template has written them
        kwargs["text_kwargs"] = {k: v for k, v in defaults.items() if k not in kwargs} | kwargs.get("text_kwargs", {})
        with _tokenizing:
            inputs = self.vlm_processor(images=of_text, text=text, **kwargs)
        if "suffix" not in kwargs:
            inputs.pop("labels", None)  # of PaliGemma, without a label
        return inputs

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As of every processor; of a model that began as a VLM, as that of the VLM."""
        if self.vlm_processor is None or self.vlm_processor.chat_template is None:
            return super().apply_chat_template(conversation, *args, **kwargs)
        return self.vlm_processor.apply_chat_template(conversation, *args, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Texts as a list, images as a flat list of RGB images. See `__call__`."""
        if text is not None:
            text = [text] if isinstance(text, str) or not isinstance(text, Iterable) else list(text)
        if images is not None:
            images = _flatten(images)
            if not images:
                raise ValueError("`images` is empty; expected at least one image, or None.")
            distinct, numbers = _distinct(images)
            loaded = [
                load_image(image, f"images[{numbers.index(number)}]", allow_urls=self.allow_urls)
                for number, image in enumerate(distinct)
            ]
            images = [loaded[number] for number in numbers]
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
            try:
                sample.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"`text[{i}]` is {ascii(sample):.100}; expected text without half a surrogate pair."
                ) from error
        if boxes is not None and images is None:
            raise ValueError("`boxes` was given without `images`; expected the images they lie in.")

    def check_proportions(self, size: tuple[int, int], name: str = "image", resized_to: Any = None):
        """Refuses a picture so narrow that it would become huge once its shorter side fits the model's view.

        Args:
            size: (width, height) in pixels.
            name: What the error calls it.
            resized_to: The `size` of a call, instead of that of the image processor.

        Raises:
            ValueError: If more than `MAX_RESIZED_PIXELS` would come of it.
        """
        for image_processor in (self.image_processor, getattr(self.vlm_processor, "image_processor", None)):
            edges = resized_to or getattr(image_processor, "size", None) or {}
            edges = {"shortest_edge": edges} if isinstance(edges, int) else edges
            shortest = None if isinstance(edges, Sequence) else edges.get("shortest_edge")
            # Others bound the longer side, or cut into tiles.
            if not shortest or edges.get("longest_edge") or getattr(image_processor, "image_grid_pinpoints", None):
                continue
            most = MAX_RESIZED_PIXELS // shortest**2
            if not most:
                largest = math.isqrt(MAX_RESIZED_PIXELS)
                raise ValueError(f"`shortest_edge` of `size` is {shortest}; expected at most {largest} pixels.")
            if max(size) > most * min(size):
                raise ValueError(
                    f"`{name}` has {size[0]} x {size[1]} pixels; expected a longer side of at most {most} times the "
                    f"shorter, which is resized to {shortest} pixels."
                )

    def _process_images(self, images, boxes=None, **kwargs):
        for number, image in enumerate(images):
            self.check_proportions(image.size, f"images[{number}]", kwargs.get("size"))
        distinct, numbers = _distinct(images)
        features = self.image_processor(distinct, **kwargs)
        if self.vlm_processor is not None:
            features = BatchFeature({"pixel_values": _whole_images(features["pixel_values"], len(distinct))})
        shapes = [pixels.shape for pixels in features["pixel_values"]]
        is_patches = "spatial_shapes" in features  # (P, patch * patch * 3) of each image
        if any(len(shape) != (2 if is_patches else 3) for shape in shapes):
            raise ValueError(
                f"`image_processor` is a {type(self.image_processor).__name__}, which makes pixel values of shape "
                f"{tuple(shapes[0])} of an image; expected (3, H, W)."
            )
        if len(distinct) < len(images):
            features = BatchFeature({name: _repeated(value, numbers) for name, value in features.items()})
            shapes = [shapes[number] for number in numbers]
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
        return self.visual_token * self.num_visual_tokens

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

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        super()._check_special_mm_tokens(text, text_inputs, modalities)
        self.note_cut_texts(text_inputs)

    def note_cut_texts(self, text_inputs):
        """Counts the texts that a tokenizer cut, of which it returned `text_inputs`."""
        for encoding in text_inputs.encodings or []:
            if encoding.overflowing:
                kept, *rest = (sum(part.attention_mask) for part in (encoding, *encoding.overflowing))
                self.note_cut_text(kept + sum(rest), kept)

    def note_cut_text(self, length: int, kept: int):
        """Counts a text that was cut in `cut_texts`; the first is logged.

        Args:
            length, kept: How many tokens it had, and has.
        """
        if not self.cut_texts:
            logger.warning(
                "A text of %d tokens was cut to %d. Further ones are counted in `cut_texts` of the processor; "
                "`model_max_length` of its tokenizer, now %d, says how long a text may be.",
                length,
                kept,
                self.tokenizer.model_max_length,
            )
        self.cut_texts += 1

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Image tokens of images of these sizes, which do not matter here."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_visual_tokens] * count, num_image_patches=[1] * count)


def _user_turn(text: str, num_images: int) -> dict:
    images: list[dict] = [{"type": "image"}] * num_images
    return {"role": "user", "content": [*images, *([{"type": "text", "text": text}] if text else [])]}


def _whole_images(pixel_values, num_images: int):
    """(N, 3, H, W), also of (N, 1, 3, H, W) or (1, N, 3, H, W), as image processors of VLMs nest them."""
    if isinstance(pixel_values, list):
        pixel_values = [torch.as_tensor(np.asarray(image)) for image in _flatten(pixel_values)]
        pixel_values = torch.stack(
            [image[0] if image.ndim == 4 and len(image) == 1 else image for image in pixel_values]
        )
    if pixel_values.ndim == 5 and 1 in pixel_values.shape[:2]:
        pixel_values = pixel_values.reshape(-1, *pixel_values.shape[2:])
    if pixel_values.ndim != 4 or len(pixel_values) != num_images:
        raise ValueError(
            f"The image processor of the VLM makes pixel values of shape {tuple(pixel_values.shape)} of {num_images} "
            "images; expected (3, H, W) of each, whole."
        )
    return pixel_values


def _limit_of(text_config) -> int:
    """Tokens that a language model takes, as `MMGEMConfig.max_sequence_length` has it."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    limits = [getattr(text_config, "max_position_embeddings", None) or LARGE_INTEGER]
    if rope.get("rope_type") == "longrope":  # whose positions change for all texts of a batch with a longer one
        limits.append(rope["original_max_position_embeddings"])
    return min(limits)


def _prepare_tokenizer(tokenizer, num_visual_tokens: int, num_embedding_tokens: int):
    """Room for an image and for [EMB] or the end token, a padding token, padding on the left."""
    if tokenizer.model_max_length < LARGE_INTEGER:
        room = tokenizer.model_max_length - num_visual_tokens - max(1, num_embedding_tokens)
        if room < 1:
            raise ValueError(
                f"`num_visual_tokens` is {num_visual_tokens}; expected fewer, so that a text fits after them into "
                f"the {tokenizer.model_max_length} tokens that the language model takes."
            )
        tokenizer.model_max_length = room
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


def _forget_calls(tokenizer):
    """Of how it was called the tokenizer is to save nothing, and which side it pads and cuts in any case."""
    for name in CALL_SETTINGS:
        tokenizer.init_kwargs.pop(name, None)
    for name in ("padding_side", "truncation_side"):
        tokenizer.init_kwargs[name] = getattr(tokenizer, name)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()


def _check_lengths(given: Mapping[str, Any]):
    """Refuses what a tokenizer ends the process for, as there is no memory for it, or names no argument for."""
    for name, least in (("max_length", 1), ("pad_to_multiple_of", 1), ("stride", 0)):
        value = given.get(name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_whole and least <= value <= MAX_TOKENS):
            raise ValueError(
                f"`{name}` is {value!r:.40}; expected a whole number of at least {least}, and at most {MAX_TOKENS:,}."
            )


def check_views(given: Mapping[str, Any]):
    """Refuses views of a picture that are larger than the largest picture that is read.

    Args:
        given: Arguments of an image processor.

    Raises:
        ValueError: If its `size`, `crop_size` or `pad_size` is.
    """
    for name in ("size", "crop_size", "pad_size"):
        value = given.get(name)
        edges: Any = [value.get("height"), value.get("width")] if hasattr(value, "get") else value
        edges = [edges] * 2 if isinstance(edges, int) else edges
        is_numbers = isinstance(edges, Sequence) and all(isinstance(edge, int) for edge in edges)
        if is_numbers and math.prod(edges) > MAX_PIXELS:
            raise ValueError(f"`{name}` is {value!r:.100}; expected at most {MAX_PIXELS:,} pixels.")


def _has_max_length(kwargs: dict) -> bool:
    return "max_length" in kwargs or "max_length" in kwargs.get("text_kwargs", {})


def _flatten(images) -> list:
    """One picture, a (nested) list of them or a 4-dimensional array, as a flat list."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray)):
        return [picture for item in images for picture in _flatten(item)]
    return [images]


def _distinct(images: Sequence) -> tuple[list, list[int]]:
    """The objects of a list, each once, and for each entry the number of its object."""
    objects = {id(image): image for image in images}
    places = {key: number for number, key in enumerate(objects)}
    return list(objects.values()), [places[id(image)] for image in images]


def _repeated(values, numbers: list[int]):
    """Entries of a tensor, an array or a list, by their numbers."""
    return [values[number] for number in numbers] if isinstance(values, list) else values[numbers]


MMGEMProcessor.register_for_auto_class()
