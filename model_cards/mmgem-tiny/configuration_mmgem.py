"""Configuration of MM-GEM: one vision tower, one causal language model, three small projections."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

MODEL_CLASS = "modeling_mmgem.MMGEMModel"
AUTO_MAP = {
    "AutoConfig": "configuration_mmgem.MMGEMConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForCausalLM": MODEL_CLASS,
    "AutoModelForImageTextToText": MODEL_CLASS,
    "AutoModelForMultimodalLM": MODEL_CLASS,
    "AutoModelForZeroShotImageClassification": MODEL_CLASS,
}
# transformers 5 has no stock image-to-text task, and some of the others do not fit; `pipeline` looks here first.
CUSTOM_PIPELINES = {
    task: {"impl": f"pipeline_mmgem.MMGEM{name}Pipeline", "pt": [auto_class], "type": kind}
    for task, name, auto_class, kind in (
        ("image-to-text", "ImageToText", "AutoModelForImageTextToText", "multimodal"),
        ("image-text-to-text", "ImageTextToText", "AutoModelForImageTextToText", "multimodal"),
        ("any-to-any", "ImageTextToText", "AutoModelForMultimodalLM", "multimodal"),  # the stock one needs torchvision
        (
            "zero-shot-image-classification",
            "ZeroShotImageClassification",
            "AutoModelForZeroShotImageClassification",
            "multimodal",
        ),
        ("image-feature-extraction", "ImageFeatureExtraction", "AutoModel", "image"),
        ("feature-extraction", "FeatureExtraction", "AutoModel", "text"),
    )
}
SPECIAL_TOKENS = "bos_token_id", "eos_token_id", "pad_token_id"
MAX_DEPTH = 10_000
# Numbers in the configurations of towers, by name, and what is expected of them.
NUMBERS: list[tuple[re.Pattern, Callable[[float], bool], str]] = [
    (re.compile("layers|depth|blocks|experts"), lambda n: n <= MAX_DEPTH, f"at most {MAX_DEPTH}"),  # made one by one
    (
        re.compile("^((hidden|image|patch|intermediate|vocab)_size|num_(channels|.*heads))$"),
        lambda n: n >= 0,
        "0 or more",
    ),
    (re.compile("(^|_)eps(ilon)?$"), lambda n: n >= 0, "0 or more"),
    (re.compile("theta$"), lambda n: n > 0, "a number above 0"),
]
GridLayout = Literal["tokens", "channels_first", "channels_last"]


@strict
@dataclass(frozen=True, kw_only=True)
class VisionGrid:
    """Where the features of a vision tower have their patches; `patch_grid.find_grid` finds it out.

    Args:
        layout: Of the features: `"tokens"` (B, N, C), `"channels_first"` (B, C, rows, columns) or `"channels_last"`.
        num_channels: Of an image.
        image_size: (height, width) of the images that the tower was made for, in pixels.
        stride: (height, width) of a patch in pixels.
        hidden_size: Width C of the features.
        prefix_tokens, suffix_tokens: Tokens before and after the patches: of the class, of registers, ...
        any_size: Whether the tower takes images of other sizes.

    Raises:
        ValueError: If a number is out of its range. `StrictDataclassFieldValidationError` for one of a wrong type.
    """

    layout: GridLayout
    num_channels: int
    image_size: tuple[int, int]
    stride: tuple[int, int]
    hidden_size: int
    prefix_tokens: int = 0
    suffix_tokens: int = 0
    any_size: bool = True

    def __post_init__(self):
        positive = self.num_channels, *self.image_size, *self.stride, self.hidden_size
        if min(positive) < 1 or min(self.prefix_tokens, self.suffix_tokens) < 0:
            raise ValueError(f"`vision_grid` is {self}; expected sizes above 0 and numbers of tokens from 0 on.")


# What can be embedded, and the method of the model that does it. Whoever asks for an embedding by its kind asks here.
EMBEDDING_METHODS = {"text": "get_text_features", "image": "get_image_features", "fused": "get_multimodal_features"}


@strict
class MMGEMConfig(PreTrainedConfig):
    r"""Configuration of an [`MMGEMModel`] (MM-GEM, https://arxiv.org/abs/2405.19333).

    Args:
        vision_config (`dict` or `PreTrainedConfig`): Any transformers vision encoder whose features are a grid, of
            patches (`clip_vision_model`, `siglip2_vision_model`, `dinov3_vit`, ...) or of a feature map (`convnextv2`,
            `swin`, `efficientnet`, `timm_wrapper`, ...).
        vision_grid (`dict`, optional): A [`VisionGrid`], the place of the patches in these features. By default the
            model finds it out, by running the encoder.
        text_config (`dict` or `PreTrainedConfig`): Any transformers causal language model.
        vlm_config (`dict` or `PreTrainedConfig`, optional): The vision-language model that both are parts of, whose
            own code writes; `vision_config` and `text_config` are then taken from it. See `MMGEMModel.from_vlm`.
        vlm_token_type (`int`, optional): The `token_type_ids` of image tokens, where a VLM tells tokens apart.
        vlm_pixel_dims (4 or 5): Dimensions of the pixel values that the VLM takes: 5 for several images a row.
        vlm_attention (`"causal"`, `"image"`, `"prompt"` or `"unknown"`): Which tokens of a prompt with an image see
            each other both ways in the VLM: none, those of one image, or all. `from_vlm` finds it out; where it is
            none of these, captions of whole images cannot be trained in packed rows.
        projection_dim (`int`, > 0): Width D of the shared embedding space.
        num_visual_tokens (`int`): Visual tokens n of an image or a box; a square, n = g * g.
        aggregator_size (`int`, optional): Width of the attention in the PoolAggregator; by default that of the patch
            features, whose square its weights grow with.
        num_embedding_tokens (`int`, >= 1): Learned [EMB] vectors k that the model appends to read a text.
            k = 1 is MM-GEM; k > 1 with `embedding_pooling="mean"` is CoMa (https://arxiv.org/abs/2511.08480).
        embedding_pooling (`"last"`, `"mean"` or `"multi_vector"`): How k read-outs become an embedding; kept apart,
            they are k vectors of it (MetaEmbed, https://arxiv.org/abs/2509.18095).
        text_attention (`"causal"` or `"bidirectional"`): Attention among the tokens of a text, or of an image with
            text, while it is embedded (MoCa, https://arxiv.org/abs/2506.23115); generation is always causal.
        sequence_packing (`"position_ids"`, `"block_mask"` or `"none"`): How the language model keeps the sequences of
            a packed row apart: by positions that restart, by ready attention masks, or not at all, so that every
            sequence has a row of its own. `from_towers` finds it out; an answer that does not hold is refused by the
            first step of training.
        prompts (`dict[str, str]`, optional): Instructions by name, put before what is embedded by those who ask for
            them; sentence-transformers' prompts. The one named "region_caption" asks for the caption of a box.
        embedding_prompt_ids (`list[int]`, optional): Tokens, such as those of "Summary of the above in one word:",
            that stand in the place of the [EMB] vectors. The embedding is then the state of the last of them, as it
            is, (H,) wide, for images as well, so that an untrained composition embeds (E5-V,
            https://arxiv.org/abs/2407.12580).
        calibrated_modalities (`list[str]`, optional): Of `"image"`, `"text"` and `"fused"` those whose embeddings a
            `ModalityCalibrator` was fitted for.
        image_token_id (`int`, >= 0): Id of the `<image>` placeholder.
        logit_scale_init_value (`float`): Logarithm of the initial inverse temperature, as in CLIP; at most ln 100.
        logit_bias_init_value (`float`, optional): Initial bias of the logits, such as SigLIP's -10 for its sigmoid
            objective (https://arxiv.org/abs/2303.15343); by default there is no bias.

    Raises:
        ValueError: For a value outside its range. `StrictDataclassFieldValidationError` for one of a wrong type.
    """

    model_type = "mmgem"
    embedding_methods = EMBEDDING_METHODS
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vlm_config": SubConfigSpec(config_class=AutoConfig, model_type="llava", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    vision_grid: dict[str, Any] | None = None
    text_config: dict | PreTrainedConfig | None = None
    vlm_config: dict | PreTrainedConfig | None = None
    vlm_token_type: int | None = None
    vlm_pixel_dims: Literal[4, 5] = 4
    vlm_attention: Literal["causal", "image", "prompt", "unknown"] = "causal"
    projection_dim: int = 512
    num_visual_tokens: int = 64
    aggregator_size: int | None = None
    num_embedding_tokens: int = 1
    embedding_pooling: Literal["last", "mean", "multi_vector"] = "last"
    text_attention: Literal["causal", "bidirectional"] = "causal"
    sequence_packing: Literal["position_ids", "block_mask", "none"] = "position_ids"
    prompts: dict[str, str] | None = None
    embedding_prompt_ids: list[int] | None = None
    calibrated_modalities: list[str] | None = None
    image_token_id: int = 0
    logit_scale_init_value: float = math.log(1 / 0.07)
    logit_bias_init_value: float | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # Saved checkpoints carry both maps already; what a user added to them is kept.
        kwargs["auto_map"] = AUTO_MAP | (kwargs.get("auto_map") or {})
        kwargs["custom_pipelines"] = CUSTOM_PIPELINES | (kwargs.get("custom_pipelines") or {})
        if isinstance(self.vlm_config, dict):
            self.vlm_config = AutoConfig.for_model(**self.vlm_config)
        if self.vlm_config is not None:
            # The objects themselves: what is set in one place holds for the model that they configure.
            self.vision_config, self.text_config = self.vlm_config.vision_config, self.vlm_config.get_text_config()
            self.text_config.tie_word_embeddings = getattr(self.vlm_config, "tie_word_embeddings", False)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.tie_word_embeddings or bool(
            getattr(self.text_config, "tie_word_embeddings", False)
        )
        self._check_ranges()
        for part in (self.vision_config, self.text_config):
            _check_numbers(part.to_dict(), type(part).__name__)

    @property
    def is_multi_vector(self) -> bool:
        """Whether an embedding is k vectors (k, D), not one, (D,)."""
        return self.embedding_pooling == "multi_vector"

    @property
    def has_memory(self) -> bool:
        """Whether the model has [EMB] vectors, whose states after an image are enough to write about it."""
        return self.embedding_prompt_ids is None

    @property
    def embedded_kinds(self) -> list[str]:
        """The kinds of `EMBEDDING_METHODS` that the model embeds: once calibrated, what it is calibrated for."""
        kinds = list(EMBEDDING_METHODS)
        return kinds if self.calibrated_modalities is None else [k for k in kinds if k in self.calibrated_modalities]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As of every configuration.

        Raises:
            ValueError: If a value is of a wrong type or out of its range.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"`config` cannot be read ({reason}); expected that of a checkpoint.") from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As of every configuration, except that a folder of something else does not give the default one.

        Raises:
            FileNotFoundError: If there is no config.json.
            ValueError: If it is no mapping, or that of another kind of model.
        """
        name = str(pretrained_model_name_or_path)
        try:
            content, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError):  # it looks into what it read
            content = None
        if content == {}:
            raise FileNotFoundError(f"`model` is {name!r}, without a config.json; expected a checkpoint.")
        if not isinstance(content, dict):
            raise ValueError(f"`model` is {name!r}, whose config.json is no mapping; expected a configuration.")
        if content.get("model_type") != cls.model_type:
            raise ValueError(
                f"`model` is {name!r}, of type {content.get('model_type')!r}; expected {cls.model_type!r}."
            )
        return content, unused

    @property
    def max_sequence_length(self) -> int | None:
        """Tokens of the longest sequence, None for any number. Rotary positions whose frequencies change with the
        longest sequence of a batch (LongRoPE), or of any before (dynamic NTK), end where they begin to change."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
            rope_type = parameters.get("rope_type") or ""
            if rope_type == "longrope":
                limit = min(limit, parameters["original_max_position_embeddings"])
            elif "dynamic" in rope_type:
                limit = min(limit, self.text_config.max_position_embeddings - 1)
        return limit

    def to_dict(self) -> dict:
        """As saved: of a VLM's configuration the parts are not repeated."""
        content = super().to_dict()
        for part in ("vision_config", "text_config") if content.get("vlm_config") is not None else ():
            content.pop(part)
        return content

    def _check_ranges(self):
        if self.num_visual_tokens < 1 or math.isqrt(self.num_visual_tokens) ** 2 != self.num_visual_tokens:
            raise ValueError(
                f"`num_visual_tokens` is {self.num_visual_tokens}; expected a square (1, 4, 9, 16, 25, ...), "
                "because the visual tokens of an image form a g x g grid."
            )
        if self.aggregator_size is not None and self.aggregator_size < 1:
            raise ValueError(f"`aggregator_size` is {self.aggregator_size}; expected 1 or more, or None.")
        for name in ("projection_dim", "num_embedding_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a whole number of at least 1.")
        self._check_embedding_prompt()
        if self.image_token_id < 0:
            raise ValueError(f"`image_token_id` is {self.image_token_id}; expected a token id, 0 or more.")
        vocabulary_size = getattr(self.text_config, "vocab_size", None)
        # Some VLMs have no row in their vocabulary for it, and look it up nowhere.
        is_beyond = isinstance(vocabulary_size, int) and self.image_token_id >= vocabulary_size
        if is_beyond and self.vlm_config is None:
            raise ValueError(
                f"`image_token_id` is {self.image_token_id}; expected one of the {vocabulary_size} tokens of the "
                "language model."
            )
        for name in SPECIAL_TOKENS:
            self._check_token(name, vocabulary_size)
        limit = getattr(self.text_config, "max_position_embeddings", None)
        if isinstance(limit, int) and self.num_visual_tokens + self.num_embedding_tokens >= limit:
            raise ValueError(
                f"`num_visual_tokens` is {self.num_visual_tokens} beside {self.num_embedding_tokens} "
                f"`num_embedding_tokens`; expected room for a text in the {limit} tokens of the language model."
            )
        if not -math.inf < self.logit_scale_init_value <= math.log(100):
            raise ValueError(
                f"`logit_scale_init_value` is {self.logit_scale_init_value}; expected at most ln 100 = 4.6052."
            )
        if self.vision_grid is not None:
            _ = self.grid

    @property
    def grid(self) -> VisionGrid:
        """`vision_grid` as an object."""
        lists_as_tuples: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.vision_grid.items()
        }
        try:
            return VisionGrid(**lists_as_tuples)
        except (TypeError, StrictDataclassError) as error:
            raise ValueError(f"`vision_grid` is {self.vision_grid}; {error}.") from error

    def _check_token(self, name: str, vocabulary_size: int | None):
        """A token of the language model, or a list of them; some families say with -1 that there is none."""
        value = getattr(self.text_config, name, None)
        ids = value if isinstance(value, list | tuple) else [value]
        size = vocabulary_size if isinstance(vocabulary_size, int) else math.inf
        if not ids or any(one is not None and not (isinstance(one, int) and -1 <= one < size) for one in ids):
            raise ValueError(
                f"`{name}` of the language model is {value!r:.80}; expected one of its {vocabulary_size} tokens, or "
                "None."
            )

    def _check_embedding_prompt(self):
        if self.embedding_prompt_ids is None:
            return
        vocabulary_size = self.text_config.vocab_size
        if not self.embedding_prompt_ids or not all(
            0 <= token < vocabulary_size for token in self.embedding_prompt_ids
        ):
            raise ValueError(
                f"`embedding_prompt_ids` is {self.embedding_prompt_ids}; expected token ids from 0 to "
                f"{vocabulary_size - 1}, at least one."
            )
        if self.embedding_pooling != "last" or self.num_embedding_tokens != 1:
            raise ValueError(
                f"`embedding_prompt_ids` excludes `embedding_pooling` {self.embedding_pooling!r} with "
                f"`num_embedding_tokens` {self.num_embedding_tokens}: the last state of the prompt is the embedding. "
                "Expected 'last' and 1."
            )


def _check_numbers(config: dict, where: str):
    """No model is built of parts without end, or by numbers that make its states NaN."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_numbers(value, f"{where}.{name}")
        numbers = value if isinstance(value, list | tuple) else [value]
        numbers = [one for one in numbers if isinstance(one, int | float)]
        expected = next(
            (what for names, fits, what in NUMBERS if names.search(str(name)) and not all(map(fits, numbers))), ""
        )
        if any(one != one for one in numbers):
            expected = "a number"
        if expected:
            raise ValueError(f"`{name}` of {where} is {value!r:.80}; expected {expected}.")


MMGEMConfig.register_for_auto_class()

__all__ = ["MMGEMConfig"]
