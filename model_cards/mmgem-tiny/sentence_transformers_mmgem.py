"""The model in sentence-transformers: texts, images, regions and all of them together, in one list.

`SentenceTransformer` and `MultiVectorEncoder` load the same folder:

    MMGEMTransformer -> NestedVectors -+-> the first vector                  SentenceTransformer
                                       +-> MultiVectorMask -> Normalize      MultiVectorEncoder

The folder lists the first two; `MultiVectorEncoder` adds its own modules. Either class loads what the other has saved.
"""

import json
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

try:  # the processor, with which this file travels, loads without sentence-transformers
    from sentence_transformers.base.modality import infer_modality
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
except ImportError:
    raise

from .sentence_transformers_inputs import read_input
from .token_batches import batches_of_tokens, restore, tokens_at_a_time

MIXED = "message"  # what sentence-transformers calls a batch of more than one kind


class MMGEMTransformer(Transformer):
    """Embeds texts, images, regions and images with texts, each by the method of the model that is made for it.

    sentence-transformers' own module sends a list that mixes them through the chat template, and so all of it through
    the language model. Here a batch is taken apart by kind, texts go to `get_text_features`, images and regions to
    `get_image_features` (no layer of the language model runs), images with texts to `get_multimodal_features`, and the
    embeddings are put back in order.

    A text that somebody else wrote, such as the query of a visitor, is given as `{"text": query}`: that is a text in
    any case. A plain string is an image if it is the path or URL of one, and so may name any image that this machine
    can read; URLs are fetched only after `encoder[0].processor.allow_urls = True`, or a list of hosts.

    An input is a text; an image (PIL, an array or tensor of 3 dimensions, bytes, a `pathlib.Path`, or a string that
    is the path or URL of an image file, as sentence-transformers decides); `{"image": ..., "text": ...}` with one
    image or a list of them; one of these dictionaries with `"boxes"`, `[[x0, y0, x1, y1], ...]` in pixels, for several
    images a list of such lists, which are then seen instead of the whole images; `{"image": ..., "boxes": ...}` with
    one box, a region; or a conversation in the format of chat templates.

    A prompt is put before the text and after the images that it begins with. An image without a text has no place for
    one: `{"image": ..., "text": ""}` does.
    """

    forward_kwargs = {"max_rationale_tokens"}

    @property
    def modalities(self) -> list:
        """Text, image, both, and batches that mix them."""
        return [*super().modalities, MIXED]

    @staticmethod
    def _configure_use_cache(config, config_kwargs, use_cache=False):
        """Leaves the config alone: the parent turns the cache off in it, and saving would keep it off for captions."""

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.model.embedding_dim

    def preprocess(self, inputs, prompt: str | None = None, processing_kwargs=None, **kwargs) -> dict:
        """Prepares a batch.

        Args:
            inputs: The inputs, of any kinds.
            prompt: Put before every text, also that beside an image.
            processing_kwargs, kwargs: As for the parent.

        Returns:
            For inputs of one kind the model's inputs. For mixed ones those of the first kind, those of further kinds
            under keys with the prefixes `1.` and `2.`, the modalities of the kinds as `parts`, and `order`, the place
            of each input's embedding in the concatenation of the parts.

        Raises:
            ValueError, TypeError: For an input of another kind, or as the processor raises.
        """
        groups, rows = defaultdict(list), defaultdict(list)
        for row, item in enumerate(inputs):
            item, boxes = read_input(item, prompt or "", self.processor, self.modalities)
            kind = infer_modality(item, supported_modalities=self.modalities), boxes is not None
            groups[kind].append((item, boxes))
            rows[kind].append(row)
        parts = [self._preprocess_alike(group, processing_kwargs, **kwargs) for group in groups.values()]
        if len(parts) <= 1:
            return parts[0] if parts else {}

        features: dict = {"modality": MIXED, "parts": [part.pop("modality") for part in parts]}
        features["order"] = torch.tensor([row for group in rows.values() for row in group]).argsort()
        for i, part in enumerate(parts):
            # The trainer finds the columns of a dataset by known keys, so that one part keeps them as they are.
            features.update({f"{i}.{key}" if i else key: value for key, value in part.items()})
        return features

    def _preprocess_alike(self, group: list[tuple], processing_kwargs, **kwargs) -> dict:
        """Inputs of one kind, as `read_input` returns them."""
        items, boxes = zip(*group)
        processing_kwargs = dict(processing_kwargs or {})
        if isinstance(items[0], dict) and "image" in items[0] and "text" in items[0]:
            processing_kwargs["text"] = self.processor.prompt_kwargs | processing_kwargs.get("text", {})
        if boxes[0] is not None:
            per_image = [row for of_input in boxes for row in of_input]
            processing_kwargs["image"] = {**processing_kwargs.get("image", {}), "boxes": per_image}
        return super().preprocess(list(items), processing_kwargs=processing_kwargs, **kwargs)

    def forward(self, features: dict, max_rationale_tokens: int = 0, **kwargs) -> dict:
        """Embeds a batch.

        Args:
            features: What `preprocess` returns.
            max_rationale_tokens: How many tokens the model may write about each text, and image with text, and read
                with it before it is embedded. An image without a text is embedded as ever.

        Returns:
            `token_embeddings` (B, k, D), not normalised, in the order of the inputs; k is 1 unless the model keeps
            several vectors. `attention_mask` (B, k): all of them count. `is_image` (B,): images alone.

        Raises:
            ValueError: A mixed batch was cut into pieces, as losses with a gradient cache do; and as the model.
        """
        modality = features.get("modality", "text")
        if modality != MIXED:
            vectors = self._vectors(features, modality, max_rationale_tokens)
            is_image = torch.full(vectors.shape[:1], modality == "image", device=vectors.device)  # (B,)
        else:
            parts = []
            for i, modality_of_part in enumerate(features["parts"]):
                prefix = f"{i}." if i else ""
                part = {key[len(prefix) :]: value for key, value in features.items() if key.startswith(prefix)}
                parts.append(self._vectors(part, modality_of_part, max_rationale_tokens))
            vectors, order = torch.cat(parts), features["order"]
            if len(vectors) != len(order):
                raise ValueError(
                    f"`features` has {len(vectors)} inputs in its parts for a batch of {len(order)}; expected a mixed "
                    "batch as `preprocess` returned it. Losses with a gradient cache need columns of one kind each."
                )
            kinds = [len(part) * [kind == "image"] for part, kind in zip(parts, features["parts"], strict=True)]
            is_image = torch.tensor(sum(kinds, []), device=vectors.device)[order]  # (B,)
            vectors = vectors[order]
        mask = torch.ones(vectors.shape[:2], dtype=torch.long, device=vectors.device)
        return {
            "modality": modality,
            self.module_output_name: vectors,
            "attention_mask": mask,
            "is_image": is_image,
        }

    def _vectors(self, features: dict, modality, max_rationale_tokens: int) -> torch.Tensor:
        """The embeddings of inputs of one kind, (B, k, D)."""
        inputs = {name: features[name] for name in self.processor.model_input_names if name in features}
        method = getattr(self.model, self.modality_config[modality]["method"])
        if max_rationale_tokens and modality != "image":
            method = self.model.get_multimodal_features
            inputs["max_rationale_tokens"] = max_rationale_tokens
        encodes = torch.is_inference_mode_enabled() and not torch.compiler.is_compiling()
        if modality == "text" and encodes and not max_rationale_tokens:
            vectors = _embed_by_tokens(method, inputs)
        else:
            vectors = method(**inputs, return_dict=True).pooler_output
        if modality == "image" and "boxes" in inputs:
            vectors = vectors.squeeze(1)  # (B, 1, ...), a region each
        return vectors if self.model.config.is_multi_vector else vectors.unsqueeze(1)

    def save(self, output_path: str, *args, **kwargs) -> None:
        """Saves the model with the prompts of the encoder, which has just written its settings to the same folder."""
        settings = Path(output_path, "config_sentence_transformers.json")
        of_encoder = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        config = self.model.config
        if "prompts" in of_encoder:
            known = config.prompts or {}
            # Encoders have prompts for queries and documents in any case, if empty ones.
            config.prompts = {n: text for n, text in of_encoder["prompts"].items() if text or n in known} or None
        super().save(output_path, *args, **kwargs)
        of_model = json.loads(settings.read_text(encoding="utf-8"))
        kept = {"model_type": of_model["model_type"]}  # which either class loads
        if of_encoder.get("model_type") == of_model["model_type"]:
            # For `MultiVectorEncoder`, which finds one vector's function here and would take the sum for its own.
            kept["similarity_fn_name"] = of_model["similarity_fn_name"]
        settings.write_text(json.dumps(of_model | of_encoder | kept, indent=2) + "\n", encoding="utf-8")


class NestedVectors(Dense):
    """Keeps the first of the k vectors of an embedding.

    A model that was trained over nested groups of vectors (MetaEmbed, https://arxiv.org/abs/2509.18095) is as good as
    a number of them allows, and the first r are what it would have given with r. Ask for them by
    `encode(..., num_vectors=r)`, with another r for documents than for queries, or for all of what is encoded by
    `config_kwargs={"num_vectors": r}` when the encoder is loaded.

    MaxSim lets the query ask. Where an image is the query (`encode_query`), its first vector asks, that of the whole,
    unless a number is given: it finds as much as all, and more where texts alone asked in training, as they did once.

    To `MultiVectorEncoder` it is the projection of the vectors, which has happened in the model: where it finds no
    `Dense`, it adds a random one.

    Args:
        embedding_dimension: Width D of the vectors.
        num_vectors: How many to keep; by default all.

    Raises:
        ValueError: If `num_vectors` is not a whole number of at least 1.
    """

    config_keys = ["embedding_dimension", "num_vectors"]
    forward_kwargs = {"num_vectors", "task"}

    def __init__(self, embedding_dimension: int, num_vectors: int | None = None):
        super(Dense, self).__init__()  # without the weights of a `Dense`
        _check_num_vectors(num_vectors)
        self.embedding_dimension = embedding_dimension
        self.num_vectors = num_vectors
        self.module_input_name = self.module_output_name = "token_embeddings"

    def forward(self, features: dict, num_vectors: int | None = None, task: str | None = None) -> dict:
        """Cuts `token_embeddings` (B, k, D) and `attention_mask` (B, k) to (B, r, D) and (B, r).

        Args:
            features: With both.
            num_vectors: R, by default that of the module, or k.
            task: `"query"` for what is to find documents.

        Returns:
            The features, and the first vector as the `sentence_embedding` (B, D), of length 1.

        Raises:
            ValueError: If r is not a whole number from 1 to k.
        """
        num_vectors = self.num_vectors if num_vectors is None else num_vectors
        _check_num_vectors(num_vectors, features[self.module_input_name].shape[1])
        cut = {name: features[name][:, :num_vectors] for name in (self.module_input_name, "attention_mask")}
        if task == "query" and num_vectors is None and "is_image" in features:
            mask = cut["attention_mask"]
            is_further = features["is_image"][:, None] & (
                torch.arange(mask.shape[1], device=mask.device) > 0
            )  # (B, r)
            cut["attention_mask"] = mask.masked_fill(is_further, 0)
        first = F.normalize(features[self.module_input_name][:, 0], dim=-1)  # (B, D)
        return {**features, **cut, "sentence_embedding": first}

    def on_model_ready(self, model) -> None:
        """Takes out what `MultiVectorEncoder` has added a second time, to a folder that it saved with the first."""
        kept: dict = {}
        for name, module in model.named_children():
            is_addition = isinstance(module, MultiVectorMask | Normalize)
            kept.setdefault(
                (type(module), getattr(module, "module_input_name", None)) if is_addition else name, (name, module)
            )
        model._modules = dict(kept.values())  # not in place: whoever calls this goes through them

    def get_embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.embedding_dimension

    def get_config_dict(self) -> dict:
        """What makes the module again."""
        return super(Dense, self).get_config_dict()

    def save(self, output_path: str, *args, **kwargs) -> None:
        """Saves the config; there are no weights."""
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, *args, config_kwargs: dict | None = None, **kwargs) -> "NestedVectors":
        """Loads the module, with the `num_vectors` of `config_kwargs` if it is there."""
        places = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        where = {name: kwargs[name] for name in places if name in kwargs}
        config = cls.load_config(model_name_or_path, *args, **where)
        if config_kwargs and "num_vectors" in config_kwargs:
            config["num_vectors"] = config_kwargs["num_vectors"]
        return cls(**config)


def _embed_by_tokens(method, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The embeddings of texts, padded to the longest, in batches that are as large as suits the device."""
    is_token = inputs["attention_mask"].bool()  # (B, L)
    batches = list(batches_of_tokens(is_token.sum(-1).tolist(), tokens_at_a_time(is_token.device)))
    parts = []
    for batch in batches:
        columns = is_token[batch].any(0)  # (L,)
        own = {name: values[batch][:, columns] for name, values in inputs.items()}
        parts.append(method(**own, return_dict=True).pooler_output)
    return restore(parts, batches)


def _check_num_vectors(num_vectors: int | None, available: int | None = None):
    if num_vectors is None:
        return
    is_whole = isinstance(num_vectors, int) and not isinstance(num_vectors, bool)
    if not is_whole or num_vectors < 1 or (available is not None and num_vectors > available):
        most = "" if available is None else f" to {available}, which the model has"
        raise ValueError(f"`num_vectors` is {num_vectors!r}; expected a whole number from 1{most}.")
