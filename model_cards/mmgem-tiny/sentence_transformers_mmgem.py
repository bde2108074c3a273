"""The model as the first module of a `SentenceTransformer`, which takes texts, images and both in one list."""

import os
from collections import defaultdict

import torch
from sentence_transformers.base.modality import infer_modality, is_message_dict
from sentence_transformers.base.modules import Transformer

MIXED = "message"  # what sentence-transformers calls a batch of more than one kind


class MMGEMTransformer(Transformer):
    """Embeds texts, images and images with texts, each by the method of the model that is made for it.

    sentence-transformers' own module sends a list that mixes them through the chat template, and so all of it through
    the language model. Here a batch is taken apart by kind, texts go to `get_text_features`, images to
    `get_image_features` (no layer of the language model runs), images with texts to `get_multimodal_features`, and the
    embeddings are put back in order.

    An input is a text; an image (PIL, an array or tensor of 3 dimensions, bytes, a `pathlib.Path`, or a string that
    is the path or URL of an image file, as sentence-transformers decides); `{"image": ..., "text": ...}` with one
    image or a list of them; or a conversation in the format of chat templates. A prompt is put before the text.
    """

    @property
    def modalities(self) -> list:
        """Text, image, both, and batches that mix them."""
        return [*super().modalities, MIXED]

    @staticmethod
    def _configure_use_cache(config, config_kwargs, use_cache=False):
        """Leaves the config alone: the parent turns the cache off in it, and saving would keep it off for captions."""

    def preprocess(self, inputs, prompt: str | None = None, processing_kwargs=None, **kwargs) -> dict:
        """Prepares a batch.

        Args:
            inputs: the inputs, of any kinds.
            prompt: put before every text, also that beside an image.
            processing_kwargs, kwargs: as for the parent.

        Returns:
            For inputs of one kind the model's inputs. For mixed ones those of the first kind, those of further kinds
            under keys with the prefixes `1.` and `2.`, the kinds as `parts`, and `order`, the place of each input's
            embedding in the concatenation of the parts.

        Raises:
            ValueError, TypeError: for an input of another kind, or as the processor raises.
        """
        kwargs["processing_kwargs"] = processing_kwargs
        items = [self._routable(item, prompt or "") for item in inputs]
        groups, rows = defaultdict(list), defaultdict(list)
        for row, item in enumerate(items):
            modality = infer_modality(item, supported_modalities=self.modalities)
            groups[modality].append(item)
            rows[modality].append(row)
        if len(groups) <= 1:
            return super().preprocess(items, **kwargs)

        features: dict = {"modality": MIXED, "parts": list(groups)}
        features["order"] = torch.tensor([row for group in rows.values() for row in group]).argsort()
        for i, group in enumerate(groups.values()):
            part = super().preprocess(group, **kwargs)
            del part["modality"]
            # The trainer finds the columns of a dataset by known keys, so that one part keeps them as they are.
            features.update({f"{i}.{key}" if i else key: value for key, value in part.items()})
        return features

    def _routable(self, item, prompt: str):
        """One input in a form that tells its modality, with its prompt and its image placeholders."""
        if isinstance(item, (bytes, os.PathLike)):
            return {"image": item}
        if is_message_dict(item) or isinstance(item, list) and item and is_message_dict(item[0]):
            item = self._from_conversation(item)
        modality = infer_modality(item, supported_modalities=self.modalities)
        image_token = self.processor.image_token
        parts = item if isinstance(item, dict) else {modality: item}
        text, images = parts.get("text", ""), parts.get("image")
        if not isinstance(text, str):
            raise ValueError(f"`inputs` has a text of type {type(text).__name__}; expected a string.")
        if modality == "text":
            # Without an image there is nothing a placeholder could stand for: it is a word that happens to be there.
            return {"text": prompt + text.replace(image_token, image_token.strip("<>"))}
        if modality == ("image", "text"):
            images = images if isinstance(images, (list, tuple)) else [images]
            placeholders = "" if image_token in text else image_token * len(images)
            return {"image": images, "text": placeholders + prompt + text}
        if isinstance(images, (list, tuple)):
            raise ValueError(f"`inputs` has a list of {len(images)} images without a text; expected one image.")
        return item

    def _from_conversation(self, conversation):
        """A conversation as its text, with its images where it has any."""
        messages = [conversation] if is_message_dict(conversation) else conversation
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        sources = ("image", "url", "path", "base64")
        images = [part[key] for part in parts if part["type"] == "image" for key in sources if key in part]
        text = self.processor.apply_chat_template(messages)
        return {"image": images, "text": text} if images else {"text": text}

    def forward(self, features: dict, **kwargs) -> dict:
        """Adds the embeddings of a batch, `(B, D)`, in the order of its inputs.

        Raises:
            ValueError: a mixed batch was cut into pieces, as losses with a gradient cache do.
        """
        if features.get("modality") != MIXED:
            return super().forward(features, **kwargs)
        parts = []
        for i, modality in enumerate(features["parts"]):
            prefix = f"{i}." if i else ""
            part = {key[len(prefix) :]: value for key, value in features.items() if key.startswith(prefix)}
            parts.append(super().forward({**part, "modality": modality}, **kwargs)[self.module_output_name])
        embeddings, order = torch.cat(parts), features["order"]
        if len(embeddings) != len(order):
            raise ValueError(
                f"`features` has {len(embeddings)} inputs in its parts for a batch of {len(order)}; expected a mixed "
                "batch as `preprocess` returned it. Losses with a gradient cache need columns of one kind each."
            )
        return {"modality": MIXED, self.module_output_name: embeddings[order]}
