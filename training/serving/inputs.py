"""What a request holds, as tensors of single inputs, and single inputs as batches.

Reading is apart from embedding, so that pictures are decoded while the model works, and only small tensors wait.
"""

import base64
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmgem.processing.image_loading import open_picture
from mmgem.processing.url_fetching import fetch, is_url
from mmgem.training.serving.limits import Limits
from mmgem.training.serving.schemas import EmbeddingInput, Message

CHARACTERS_OF_A_TOKEN = 100  # the most; beyond that, a text is not tokenized to find out how long it is


@dataclass(frozen=True)
class ModelInput:
    """One input as the processor prepares it.

    Args:
        kind: "text", "image" or "fused", as in `EMBEDDING_METHODS`, or "chat".
        input_ids: L token ids, None of an image.
        tensors: All else that the model takes of it, with a first dimension of 1, or of its images.
    """

    kind: str
    input_ids: list[int] | None
    tensors: dict[str, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens that the language model reads."""
        return len(self.input_ids or ())

    @property
    def batch_key(self) -> Hashable:
        """Inputs for which it is equal can be given to the model together."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(self.tensors.items()))
        return self.kind, shapes


class InputReader:
    """Turns the inputs of requests into those of the model; may be used by several threads.

    Args:
        processor: An `MMGEMProcessor`, whose `allow_urls` says whether pictures are fetched.
        limits: How large pictures and texts may be.
    """

    def __init__(self, processor, limits: Limits):
        self.processor = processor
        self.limits = limits
        self._tokenizing = threading.Lock()  # tokenizers change their own settings while they work
        self._token_limit = min(processor.text_limit, limits.max_tokens)

    def embedding_input(self, item: EmbeddingInput, name: str, prompt: str = "", is_cut: bool = False) -> ModelInput:
        """Reads what is to be embedded.

        Args:
            item: As it came.
            name: What errors call it.
            prompt: Put before the text.
            is_cut: Whether a text that is too long is cut, instead of refused.

        Raises:
            ValueError: If it cannot be read, or is too large.
        """
        sources = [item.image] if isinstance(item.image, str) else item.image or []
        images = [self.picture(source, f"{name}.image") for source in sources]
        boxes = None if item.boxes is None else [item.boxes]
        if item.text is None:
            return ModelInput("image", None, dict(self._prepare(images=images, boxes=boxes)))
        if not images:
            # Without an image there is nothing a placeholder could stand for.
            text = prompt + self.processor.plain_text(item.text)
            return self._read("text", name, text, is_cut=is_cut)
        text = self.processor.prompt(prompt + item.text, len(images))
        return self._read("fused", name, text, images, boxes, is_cut, **self.processor.prompt_kwargs)

    def chat_input(self, messages: Sequence[Message]) -> ModelInput:
        """Reads a conversation that is to be answered.

        Raises:
            ValueError: If it cannot be read, is too long, or holds nothing.
        """
        images, conversation = [], []
        for number, message in enumerate(messages):
            content: list[dict[str, Any]] = []
            for part in message.parts():
                if part.image_url is not None:
                    images.append(self.picture(part.image_url.url, f"messages[{number}].content"))
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": self.processor.plain_text(part.text or "")})
            conversation.append({"role": message.role, "content": content})
        options = {"add_generation_prompt": True, "enable_thinking": False}  # of templates that know them
        prompt = self.processor.apply_chat_template(conversation, **options)
        read = self._read("chat", "messages", prompt, images, None, **self.processor.prompt_kwargs)
        if not read.num_tokens:
            raise ValueError("`messages` holds no text and no image; expected something to answer.")
        return read

    def picture(self, source: str, name: str, shorter_side: int | None = None) -> Image.Image:
        """Reads a picture, which is never a file of this machine.

        Args:
            source: A data URI, or a URL.
            name: What errors call it.
            shorter_side: As for `load_image`.

        Raises:
            ValueError: If it is neither, or cannot be read.
        """
        label = f"`{name}`"
        if is_url(source):
            data = fetch(source, label, self.processor.allow_urls)
        else:
            header, comma, text = source.partition(",")
            if not (source.startswith("data:") and header.endswith(";base64") and comma):
                raise ValueError(
                    f"{label} is {source[:60]!r}; expected a data URI of an image, `data:image/png;base64,...`."
                )
            try:
                data = base64.b64decode(text, validate=True)
            except ValueError as error:
                raise ValueError(f"{label} is no base64 ({error}); expected a data URI of an image.") from error
        return open_picture(data, label, self.limits.max_pixels, shorter_side).decode()

    def _read(self, kind: str, name: str, text: str, images=None, boxes=None, is_cut=False, **kwargs) -> ModelInput:
        limit = self._token_limit
        if len(text) > limit * CHARACTERS_OF_A_TOKEN:
            raise ValueError(f"`{name}` has {len(text):,} characters; expected at most {limit:,} tokens.")
        if not is_cut:
            kwargs["truncation"] = False
        inputs = self._prepare(images=images or None, boxes=boxes, text=[text], padding=False, **kwargs)
        ids = inputs.pop("input_ids")[0].tolist()
        inputs.pop("attention_mask", None)
        of_images = self.processor.tokenizer.convert_tokens_to_ids(self.processor.visual_token) if images else None
        length = sum(token != of_images for token in ids)
        if length > limit:
            raise ValueError(f"`{name}` has {length:,} tokens; expected at most {limit:,}.")
        return ModelInput(kind, ids, inputs)

    def _prepare(self, **kwargs) -> dict[str, torch.Tensor]:
        with self._tokenizing:
            return dict(self.processor(**kwargs, return_tensors="pt").items())


def collate(rows: Sequence[ModelInput], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The batch of inputs with equal keys: texts padded on the left, all else one after the other."""
    batch = {name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors}
    if rows[0].input_ids is not None:
        texts = [row.input_ids or [] for row in rows]
        length = max(map(len, texts))
        batch["input_ids"] = torch.full((len(rows), length), pad_token_id)  # (B, L)
        batch["attention_mask"] = torch.zeros((len(rows), length), dtype=torch.long)
        for number, ids in enumerate(texts):
            if ids:
                batch["input_ids"][number, -len(ids) :] = torch.tensor(ids)
                batch["attention_mask"][number, -len(ids) :] = 1
    return batch
