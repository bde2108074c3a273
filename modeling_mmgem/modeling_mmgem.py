"""MM-GEM: one model that embeds images, regions and texts, and writes about them.

    image -> vision tower -> patch grid -> PoolAggregator -> n visual tokens -+- mean -> image_projection -> embedding
                                                                              +- token_projection -> prefix of the LLM
    text  -> LLM -> read-out at the appended [EMB] vectors -> text_projection -> embedding

Multimodal Generative Embedding Model, https://arxiv.org/abs/2405.19333.
"""

import math
from collections import OrderedDict
from dataclasses import asdict, dataclass
from functools import partial, wraps
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoProcessor, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import (
    PROCESSOR_NAME,
    TRANSFORMERS_DYNAMIC_MODULE_NAME,
    can_return_tuple,
    torch_compilable_check,
)

from .candidate_ranking import generate_ranked, is_caption_prompt, why_not_ranked
from .configuration_mmgem import MMGEMConfig
from .contrastive_batch import ContrastiveBatch, default_image_ids, is_distributed
from .image_vectors import QUERY_STD, ImageVectors
from .input_checks import (
    TOKEN_IDS,
    check_boxes,
    check_generation,
    check_ids,
    check_labels,
    check_no_other,
    check_pixels,
    check_vectors,
    checked_mask,
    fit_length,
    is_box,
)
from .joint_step import JointStep
from .language_model_probe import PROBING, check_reading
from .late_interaction import similarity
from .modality_calibrator import ModalityCalibrator
from .patch_grid import IMAGE_INPUTS, boxes_on_grid, check_grid, find_grid, image_size_of, patch_grid
from .pool_aggregator import PoolAggregator, attention_heads
from .sentence_transformers_files import write_sentence_transformers_files
from .similarity_map import similarity_map
from .text_rows import TEXT_COLUMNS, TextRows, documents_text_columns, first_token_id, is_first_token
from .tower_composition import DEFAULT_MAX_NEW_TOKENS, build_vision_tower, compose_towers
from .vision_language_model import (
    VisionLanguageModel,
    build_vlm,
    check_image_reading,
    compose_from_vlm,
    read_prompt,
    without_layers,
)
from .weight_checks import check_generation_file, check_offloaded, check_room, check_whole, loading

MAX_LOGIT_SCALE = math.log(100)
IMAGES_OF_PROMPTS = {*IMAGE_INPUTS, "visual_tokens", "boxes"}


@dataclass
class MMGEMOutput(CausalLMOutputWithPast):
    """The output of `forward` for a prompt (`logits`, ...), or for images and texts (`logits_per_image`, ...).

    Args:
        loss: Scalar. Language modelling loss of a prompt with `labels`; caption + contrastive loss with `return_loss`.
        logits: (B, L, vocabulary) next-token scores.
        past_key_values, hidden_states, attentions: Of the language model, as in `CausalLMOutputWithPast`, whose
            fields differ between versions of transformers.
        caption_loss: Scalar, mean (or sum / `num_items_in_batch`) over the caption tokens.
        contrastive_loss: Scalar, InfoNCE of images and texts, plus that of boxes and texts.
        contrastive_batch: What a contrastive loss is computed from, of this process; with `return_loss`.
        visual_tokens: (I, n, C) of the images, from which `generate` writes; with `return_contrastive_batch`.
        image_norm, text_norm: Scalars, mean length of the embeddings before they are normalised; with `return_loss`.
        logits_per_image: (B, T) scaled similarity of every image with every text: the cosine, or MaxSim.
        logits_per_text: (T, B), its transpose.
        image_embeds: (B, D) unit vectors, or (B, k, D).
        text_embeds: (T, D) unit vectors, or (T, k, D); with `return_loss` those of the contrastive queries.
    """

    caption_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    contrastive_batch: ContrastiveBatch | None = None
    visual_tokens: torch.FloatTensor | None = None
    image_norm: torch.FloatTensor | None = None
    text_norm: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None

    def __setattr__(self, name: str, value):
        # As the parent does it, which lists all fields anew for each of them: 0.1 ms of every token that is written.
        if value is not None and name in self.__dataclass_fields__:
            OrderedDict.__setitem__(self, name, value)
        object.__setattr__(self, name, value)


class MMGEMModel(JointStep, PreTrainedModel, GenerationMixin):
    """One class that embeds and generates; see [`MMGEMConfig`] for its parts and [`MMGEMModel.from_towers`] for
    composing it from pretrained ones, or [`MMGEMModel.from_vlm`] for starting from a finished vision-language model.

    - `get_image_features`: images, or boxes in them, to embeddings. No layer of the language model runs.
    - `get_text_features`, `get_multimodal_features`: texts, or images with texts, to embeddings. No vocabulary head.
    - `generate`: captions and answers, from `input_ids` with `<image>` placeholders and `pixel_values`, or from
      `embedding_tokens`, the memory of an image.
    - `forward`: CLIP's meaning for images and texts, LLaVA's for prompts; see there.

    An embedding is (D,) wide, or (k, D) with `embedding_pooling="multi_vector"`; `late_interaction.similarity`
    compares either kind. With `embedding_prompt_ids` it is (H,) wide, and images go through the language model.
    """

    config_class = MMGEMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values"]
    _load_video_processor = False

    def __init__(self, config: MMGEMConfig):
        super().__init__(config)
        self.vlm = None
        if config.vlm_config is None:
            self.vision_tower = build_vision_tower(config.vision_config)
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        else:
            self.vlm = VisionLanguageModel(build_vlm(config.vlm_config))
            for name, part in self.vlm.parts.items():
                self.add_module(name, part)
        if config.vision_grid is None:
            config.vision_grid = asdict(find_grid(self.vision_tower))
        vision_size, text_size = config.grid.hidden_size, config.text_config.hidden_size
        if (attention_size := config.aggregator_size) is None:
            num_heads = attention_heads(config.vision_config, vision_size)
        else:
            num_heads = attention_heads(None, attention_size)
        self.pool_aggregator = PoolAggregator(vision_size, num_heads, config.num_visual_tokens, attention_size)
        self.image_projection = nn.Sequential(
            nn.LayerNorm(vision_size), nn.Linear(vision_size, config.projection_dim, bias=False)
        )
        self.text_projection = nn.Linear(text_size, config.projection_dim, bias=False)
        self.token_projection = nn.Sequential(
            nn.LayerNorm(vision_size), nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size)
        )
        self.embedding_tokens = nn.Parameter(torch.empty(config.num_embedding_tokens, text_size))
        self.image_vectors = self._make_image_vectors()
        self.calibrator = None
        if config.calibrated_modalities is not None:
            num_vectors = config.num_embedding_tokens if config.embedding_pooling == "multi_vector" else None
            self.calibrator = ModalityCalibrator(self.embedding_dim, config.calibrated_modalities, num_vectors)
        self.logit_scale = nn.Parameter(torch.tensor([config.logit_scale_init_value]))
        has_bias = config.logit_bias_init_value is not None
        self.logit_bias = nn.Parameter(torch.tensor([config.logit_bias_init_value])) if has_bias else None
        # Its name differs between versions of transformers, and between families.
        writer = self.language_model if self.vlm is None else self.vlm.of(self)
        names, accepted = ("cache", "cache_params"), signature(writer.forward).parameters
        self._cache_argument = next((name for name in names if name in accepted), "past_key_values")
        self._takes_logits_to_keep = "logits_to_keep" in accepted
        declared = {*type(config.text_config).__dataclass_fields__, *config.text_config.attribute_map}
        self._is_state_space = "num_attention_heads" not in declared  # Mamba and its kin
        self._checked_reading: tuple | str | None = None  # see `_check_reading`
        self._loaded_processor: tuple = (None, None)  # see `_save_processor`
        # Not to be guessed from the class name: the Trainer counts labels by it, and full-graph compile needs it.
        self.loss_type = "ForCausalLM"
        self.post_init()
        # Towers list layers of their siblings too; FSDP expects to find each.
        self._no_split_modules = sorted(set(self._no_split_modules) & {type(m).__name__ for m in self.modules()})
        self.generation_config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # Not by `isinstance(module, PoolAggregator)`: modules without parameters of their own are passed over.
        if module is self.pool_aggregator.output:
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ImageVectors):
            init.normal_(module.queries, std=QUERY_STD)
            init.xavier_uniform_(module.key.weight)
        elif isinstance(module, ModalityCalibrator):
            for mean in module.buffers():
                init.constant_(mean, math.nan)  # not fitted
        elif isinstance(module, MMGEMModel):
            init.normal_(module.embedding_tokens, std=0.02)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                init.constant_(module.logit_bias, self.config.logit_bias_init_value)

    @classmethod
    def from_towers(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        image_token_id: int | None = None,
        dtype: str | torch.dtype | None = None,
        gguf_file: str | None = None,
        **config_kwargs,
    ) -> "MMGEMModel":
        """Compose pretrained towers: `MMGEMModel.from_towers("openai/clip-vit-large-patch14", "TinyLlama/...")`.

        Args:
            vision: Hub name or folder of a vision encoder whose features are a grid, or of a dual encoder or VLM that
                contains one (CLIP, SigLIP, LLaVA); or such a model itself.
            text: Hub name or folder of a causal language model, or the model itself.
            image_token_id: Id of `<image>`. By default the id that `MMGEMProcessor.from_towers` gives it: the next
                free one of the tokenizer of `text`, or, for a model object, the next row of its vocabulary.
            dtype: Type of the weights, such as `"bfloat16"`; by default that of the towers, if it is the same.
            gguf_file: File in the folder `text` to read the language model from.
            config_kwargs: Further fields of [`MMGEMConfig`].

        Returns:
            The composed model; towers as they were, LoRA of a `PeftModel` merged, projections and aggregator fresh.

        Raises:
            ValueError: If the features of the vision tower are no grid, if the language model is no causal one, if
                weights are missing, quantized or of two types.
        """
        return compose_towers(cls, vision, text, image_token_id, dtype, gguf_file, **config_kwargs)

    @classmethod
    def from_vlm(cls, vlm: str | PreTrainedModel, processor=None, **config_kwargs) -> "MMGEMModel":
        """Start from a finished vision-language model: `MMGEMModel.from_vlm("HuggingFaceTB/SmolVLM-256M-Instruct")`.

        Its vision encoder becomes the vision tower, its decoder the language model, and its own code goes on to run on
        them: for the prompts of its own processor the model writes what the VLM writes.

        Args:
            vlm: Hub name or folder of a VLM of transformers, or the VLM itself, whose weights are copied.
            processor: The processor of the VLM, if it is not to be loaded from `vlm`. Some VLMs (PaliGemma, Gemma 3)
                can be trained to write only with it.
            config_kwargs: Further fields of [`MMGEMConfig`].

        Returns:
            The model; projections and aggregator are fresh.

        Raises:
            ValueError: If the VLM is no vision encoder with a patch grid and a causal language model, joined by image
                tokens; if weights are missing.
        """
        return compose_from_vlm(cls, vlm, processor, **config_kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs,
    ):
        """As of every model of transformers, except that weights which do not fit are an error that names them.

        Args:
            pretrained_model_name_or_path: Hub name or folder of a checkpoint.
            output_loading_info: Raise no error about weights, and return (model, report of those that do not fit).
            ignore_mismatched_sizes: Leave weights that have another shape in the checkpoint at random.
            args, kwargs: As for the parent.

        Raises:
            ValueError: If weights are missing, left over, of another shape or not finite, files are damaged, the
                vision tower does not answer as `vision_grid` says, arguments of `generate` that are kept with the
                model are out of their range, or accelerate is too old to keep these weights on the disk.
        """
        kwargs |= {"output_loading_info": True}
        kwargs["ignore_mismatched_sizes"] = ignore_mismatched_sizes or not output_loading_info
        name = str(pretrained_model_name_or_path)
        with loading("model", name):
            model, report = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if output_loading_info:
            return model, report
        check_whole(name, model, report, ignore_mismatched_sizes)
        check_generation_file(name, kwargs.get("subfolder") or "")
        check_offloaded(model)
        check_grid(model.vision_tower, model.config.grid)
        generation = model.generation_config.to_diff_dict()  # of a file that may have been written by hand
        kept = {  # some families say with -1 that they have no such token
            name: value for name, value in generation.items() if name not in TOKEN_IDS or value != -1
        }
        check_generation(kept, model.get_input_embeddings().num_embeddings)
        return model

    def _move_missing_keys_from_meta_to_device(self, missing_keys, *args):
        """What transformers calls before it makes room for the weights that a checkpoint lacks."""
        check_room(self, missing_keys - self.all_tied_weights_keys.keys())
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args)

    def _make_image_vectors(self) -> ImageVectors | None:
        if self.config.embedding_pooling != "multi_vector":
            return None
        return ImageVectors(self.config.grid.hidden_size, self.config.num_embedding_tokens)

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings: D, or H of the language model where a prompt reads them."""
        config = self.config
        return config.projection_dim if config.embedding_prompt_ids is None else config.text_config.hidden_size

    @torch.no_grad()
    def set_embedding_tokens(
        self, num_embedding_tokens: int, embedding_pooling: str, token_ids: list[int] | None = None
    ):
        """Read embeddings with another number of [EMB] vectors, or pool them otherwise, from now on. They are no
        longer calibrated. Texts must leave room for the vectors: `model_max_length` of the tokenizer does not change.

        Args:
            num_embedding_tokens: Number k of the vectors. The first ones stay. Further ones begin near the last of
                them, so that a text is at first embedded about as before; kept apart, they begin at random, and as
                different.
            embedding_pooling: See [`MMGEMConfig`]. Where an image had one vector, it stays the first.
            token_ids: As many tokens, as whose embeddings all vectors begin, such as the end token. A language model
                that does not train reads more by them than by vectors that begin at random.

        Raises:
            ValueError: As [`MMGEMConfig`], and for what are not as many tokens of the language model; the model is
                then as it was.
        """
        vocab_size = self.config.text_config.vocab_size
        if token_ids is not None and (
            len(token_ids) != num_embedding_tokens or not all(0 <= token < vocab_size for token in token_ids)
        ):
            raise ValueError(
                f"`token_ids` is {token_ids}; expected `num_embedding_tokens`, {num_embedding_tokens}, numbers from 0 "
                f"to {vocab_size - 1}."
            )
        self._change_read_out(num_embedding_tokens=num_embedding_tokens, embedding_pooling=embedding_pooling)
        before, kept_apart = self.embedding_tokens, embedding_pooling == "multi_vector"
        further = torch.randn(max(0, num_embedding_tokens - len(before)), before.shape[1]).to(before)  # (., H)
        further = self.get_input_embeddings().weight.std() * further if kept_apart else before[-1] + 0.02 * further
        tokens = torch.cat([before[:num_embedding_tokens], further])  # (k, H)
        if token_ids is not None:
            tokens = self.get_input_embeddings().weight[token_ids].detach().to(before)
        self.embedding_tokens = nn.Parameter(tokens)
        trained, self.image_vectors = self.image_vectors, self._make_image_vectors()
        if self.image_vectors is not None:
            self.image_vectors.to(before)
            for module in (*self.image_vectors.children(), self.image_vectors):
                self._init_weights(module)
            if trained is not None:
                queries = trained.queries[: num_embedding_tokens - 1]  # (., C)
                trained.queries = nn.Parameter(torch.cat([queries, self.image_vectors.queries[len(queries) :]]))
                self.image_vectors = trained

    def set_embedding_prompt(self, prompt_ids: list[int] | None):
        """Read embeddings, of images too, as the last state of a prompt, from now on, without any training (E5-V,
        https://arxiv.org/abs/2407.12580). They are no longer calibrated.

        Args:
            prompt_ids: Of the prompt, without special tokens, such as "Summary of the above in one word:"; None to
                read the [EMB] vector again.

        Raises:
            ValueError: For what is no token of the language model, and if there are several [EMB] vectors.
        """
        self._change_read_out(embedding_prompt_ids=prompt_ids)

    def _change_read_out(self, **changes):
        changes["calibrated_modalities"] = None  # for embeddings that there are no more
        type(self.config)(**{**self.config.to_dict(), **changes})  # refuses what does not go together
        for name, value in changes.items():
            setattr(self.config, name, value)
        self.calibrator = None

    def train(self, mode: bool = True):
        """Set the mode. A frozen vision tower stays as it will be used: without dropout, its batch statistics kept."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.language_model.set_output_embeddings(value)

    def get_decoder(self, modality: str | None = None) -> nn.Module:
        if modality == "image":
            return self.vision_tower
        decoder = self.language_model.get_decoder()
        if decoder is self.language_model or not isinstance(decoder, PreTrainedModel):
            # A guess by names that found the whole model, or its head.
            inner = (module for module in self.language_model.children() if isinstance(module, PreTrainedModel))
            decoder = next(inner, decoder)
        return decoder

    # Vision

    def _patch_grid(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels -> (B, C, rows, columns) features of the vision tower, zeros beyond `spatial_shapes`."""
        return patch_grid(self.vision_tower, self.config.grid, pixel_values, spatial_shapes)

    def _pool(
        self,
        grid: torch.Tensor,
        pixel_values: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, C, rows, columns) -> (B, n, C), or (B, R, n, C) with boxes."""
        if boxes is not None and spatial_shapes is None:  # whose patches fill their images
            vision_grid = self.config.grid
            size = image_size_of(vision_grid, grid) if pixel_values is None else tuple(pixel_values.shape[2:])
            boxes = boxes_on_grid(boxes, vision_grid, size, grid)
        return self.pool_aggregator(grid, boxes, spatial_shapes)

    def _visual_tokens(
        self, pixel_values: torch.Tensor, boxes: torch.Tensor | None, spatial_shapes: torch.Tensor | None
    ) -> torch.Tensor:
        """-> (B, n, C), or (B, R, n, C) with boxes."""
        check_pixels(pixel_values)
        check_boxes(boxes, pixel_values.shape[0])
        return self._pool(self._patch_grid(pixel_values, spatial_shapes), pixel_values, boxes, spatial_shapes)

    def _embed_visual_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., n, C) -> (..., D), or (..., k, D)"""
        if tokens.ndim == 4:  # of boxes; layers of bitsandbytes take three dimensions at most
            return self._embed_visual_tokens(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        if self.config.embedding_prompt_ids is not None:
            visual_embeds = self.token_projection(tokens)  # (B, n, H)
            return self._embed_sequences(visual_embeds, visual_embeds.new_ones(visual_embeds.shape[:2])).pooler_output
        if self.image_vectors is not None:
            return self.image_projection(self.image_vectors(tokens))
        return self.image_projection(tokens.mean(dim=-2))

    def _calibrated(self, embeds: torch.Tensor, modality: str) -> torch.Tensor:
        return embeds if self.calibrator is None else self.calibrator(embeds, modality)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        boxes: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed images, or boxes in them. The language model is not run, unless there are `embedding_prompt_ids`.

        Args:
            pixel_values: (B, 3, H, W) as the processor gives them; with `spatial_shapes` (B, P, patch * patch * 3).
            boxes: (B, R, 4) xyxy in [0, 1] of the model's view; rows of zeros are padding.
            spatial_shapes: (B, 2) rows and columns of the patches of each image, where images keep their aspect ratio
                (SigLIP 2 NaFlex); what is beyond them is padding.

        Returns:
            `pooler_output` (B, D), or (B, R, D) with boxes, unnormalised, zero for padding boxes; with several vectors
            (B, k, D) or (B, R, k, D). `last_hidden_state` (B, n, C) or (B, R, n, C), the visual tokens it comes from.

        Raises:
            TypeError: For an argument that is none.
            ValueError: For shapes that do not fit.
        """
        if self.vlm is None:  # whose processors give more
            check_no_other(kwargs, "get_image_features")
        tokens = self._visual_tokens(pixel_values, boxes, spatial_shapes)
        embeds = self._calibrated(self._embed_visual_tokens(tokens), "image")
        if boxes is not None:
            embeds = embeds * is_box(boxes).view(*boxes.shape[:2], *[1] * (embeds.ndim - 2))  # (B, R, ...)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=embeds)

    def similarity_map(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_embeds: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        num_vectors: int | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Say why an image is found: the share of each patch in its similarity with a text. The shares sum to the
        similarity, the cosine or MaxSim, exactly; a share may be negative.

        The visual tokens are weighted sums of patch features, and what follows them is linear but for three kinds of
        factors, which are taken as they are: the weights of attention and of the vectors of an image, the deviation
        that a LayerNorm divides by, and lengths. So the shares say what adds up to the score. They do not say what
        the score would be without a patch, whose features the vision tower mixes with those of its surroundings.
        What comes of biases and of a calibrator, whatever the image, is spread evenly.

        Args:
            pixel_values, spatial_shapes: Of I images, see [`get_image_features`].
            input_ids, attention_mask: (T, L) of texts, see [`get_text_features`].
            query_embeds: (T, D) or (T, k, D) in the place of texts: embeddings of any kind, of any length. Of fewer
                dimensions, they are compared with the first ones of the image.
            num_vectors: How many of the vectors of an image are compared, the first ones; by default all.
            pixel_attention_mask: Says the same as `spatial_shapes`, and is not read.

        Returns:
            (I, T, rows, columns), where the image has its patches; zeros beyond `spatial_shapes`.

        Raises:
            ValueError: If there are not either texts or `query_embeds`, or they do not fit the model; if the model
                reads images by a prompt, that is, through its language model, which has no such sum.
        """
        if (input_ids is None) == (query_embeds is None):
            given = "None" if input_ids is None else "given"
            raise ValueError(f"`input_ids` and `query_embeds` are both {given}; expected one of them.")
        if input_ids is not None:
            query_embeds = self.get_text_features(input_ids, attention_mask).pooler_output
        check_pixels(pixel_values)
        grid = self._patch_grid(pixel_values, spatial_shapes)  # (I, C, rows, columns)
        return similarity_map(self, grid, query_embeds, spatial_shapes, num_vectors)

    # Text

    def _run_decoder(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        bidirectional: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The language model without its vocabulary head. Padding is on the right, where no causal model looks.

        Args:
            inputs_embeds: (B, L, H).
            position_ids: (B, L), restarting at 0 where a new sequence begins; None if each row is one sequence.
            bidirectional: (B, L), a number per sequence whose tokens see each other both ways, -1 for causal tokens.

        Returns:
            (B, L, H) hidden states after the final norm.
        """
        decoder, mask = self.get_decoder(), None
        if bidirectional is not None or (position_ids is not None and self.config.sequence_packing == "block_mask"):
            if position_ids is None:  # some models count them from the mask, if that is of tokens
                position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]  # (1, L)
            # One mask, or one for each kind of layer, with its window.
            mask = create_masks_for_generate(
                config=decoder.config,
                inputs_embeds=inputs_embeds,
                attention_mask=None,
                past_key_values=None,
                position_ids=position_ids,
                block_sequence_ids=bidirectional,
            )
        positions = {} if position_ids is None else {"position_ids": position_ids}
        # Packed rows are recognised by their position_ids only without a cache, which must be said.
        return decoder(
            inputs_embeds=inputs_embeds, attention_mask=mask, use_cache=False, **positions
        ).last_hidden_state

    def _how_it_reads(self) -> tuple[str | int | None, ...]:
        config, attention = self.config, self.language_model.config._attn_implementation
        return config.sequence_packing, config.text_attention, config.vlm_attention, config.vlm_pixel_dims, attention

    def _check_reading(self):
        """Once for each way of reading: the language model, and the VLM, do what the configuration says."""
        how = self._how_it_reads()
        if self._checked_reading not in (how, PROBING):
            check_reading(self)
            if self.vlm is not None and not is_distributed():  # whose parameters may lie in shards
                check_image_reading(self)
            self._checked_reading = how

    def _check_length(self, length: int):
        limit = self.config.max_sequence_length
        # An export takes texts of any length, or would refuse to be one.
        if limit is not None and not torch.compiler.is_exporting() and length > limit:
            raise ValueError(
                f"`input_ids` with its image, [EMB] and end tokens is {length} tokens long; the language model takes "
                f"at most {limit}. Truncate the text when tokenizing."
            )

    def _read_out(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, k, H) states of the [EMB] vectors -> (T, D), or (T, k, D); of a prompt's tokens -> (T, H)"""
        if self.config.embedding_prompt_ids is not None:
            return hidden_states[:, -1]
        if self.config.embedding_pooling == "last":
            hidden_states = hidden_states[:, -1]
        elif self.config.embedding_pooling == "mean":
            hidden_states = hidden_states.mean(dim=1)
        return self.text_projection(hidden_states)

    def _read_out_embeds(self) -> torch.Tensor:
        """(k, H) what is appended to be read: the [EMB] vectors, or a prompt."""
        if self.config.embedding_prompt_ids is None:
            return self.embedding_tokens
        prompt_ids = torch.tensor(self.config.embedding_prompt_ids, device=self.embedding_tokens.device)
        return self.get_input_embeddings()(prompt_ids)

    def _embed_sequences(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        """(B, L, H) padded on either side -> read-out of the [EMB] vectors appended to each row."""
        embedding_tokens = self._read_out_embeds().to(inputs_embeds.dtype).expand(inputs_embeds.shape[0], -1, -1)
        batch, k, _ = embedding_tokens.shape
        inputs_embeds = torch.cat([inputs_embeds, embedding_tokens], dim=1)  # (B, L + k, H)
        width = inputs_embeds.shape[1]
        self._check_length(width)
        is_token = torch.cat([attention_mask.bool(), attention_mask.new_ones(batch, k).bool()], dim=1)  # (B, L + k)
        # Padding goes to the right, so that [EMB] stands right after the text, within reach of any window. No two keys
        # are equal: not every exported sort is stable.
        place = torch.arange(width, device=is_token.device)  # (L + k,)
        order = torch.where(is_token, place, place + width).argsort(dim=1)  # (B, L + k)
        inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))  # (B, L + k, H)
        read_out = is_token.sum(-1, keepdim=True) - k + place[:k]  # (B, k)
        bidirectional = None
        if self.config.text_attention == "bidirectional":
            if not torch.compiler.is_compiling():
                self._check_reading()
            # [EMB] vectors are causal, so that the first of them are what fewer would be: -1, as for padding, else 0.
            bidirectional = (place < read_out[:, :1]).long() - 1  # (B, L + k)
        hidden_states = self._run_decoder(inputs_embeds, bidirectional=bidirectional)  # (B, L + k, H)
        hidden_states = hidden_states.gather(1, read_out[..., None].expand_as(embedding_tokens))  # (B, k, H)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self._read_out(hidden_states)
        )  # (B, k, H), (B, D) or (B, k, D)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Embed texts. The vocabulary head is not run.

        Args:
            input_ids: (B, L), padded on either side. L may be 0: the embedding of an empty text is the read-out of
                the [EMB] vectors alone.
            attention_mask: (B, L), 1 for text; by default all of it.

        Returns:
            `pooler_output` (B, D) or (B, k, D), unnormalised; `last_hidden_state` (B, k, H), the states of the [EMB]
            vectors.

        Raises:
            TypeError: For an argument that is none.
            ValueError: For an empty batch, shapes that do not fit, or more tokens than the model takes.
        """
        if self.vlm is None:
            check_no_other(kwargs, "get_text_features")
        attention_mask = checked_mask(input_ids, attention_mask)
        self._check_placeholders(input_ids, None, None)
        outputs = self._embed_sequences(self.get_input_embeddings()(input_ids), attention_mask)
        outputs.pooler_output = self._calibrated(outputs.pooler_output, "text")
        return outputs

    @can_return_tuple
    def get_multimodal_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        max_rationale_tokens: int = 0,
        visual_tokens: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed texts that contain images. Of an image, `last_hidden_state` is the memory from which [`generate`]
        writes about it.

        Args:
            input_ids: (B, L) with n placeholders for each image, or for each box if there are boxes.
            attention_mask: (B, L).
            pixel_values: (I, 3, H, W), the images in the order of their placeholders.
            boxes: (I, R, 4) xyxy in [0, 1]; then the boxes take the place of the whole images.
            kwargs: What else the processor of a VLM gives, such as `image_grid_thw`, for a model that began as one.
            max_rationale_tokens: How many tokens the model may write about its input, which are then read with it,
                before the embedding is (RGE, reasoning before embedding, https://arxiv.org/abs/2511.16150).
            visual_tokens: (I, n, C), the `last_hidden_state` of [`get_image_features`] for the images, instead of
                `pixel_values`: the vision tower is not run again.
            spatial_shapes: (I, 2), see [`get_image_features`].

        Returns:
            `pooler_output` (B, D) or (B, k, D), unnormalised; `last_hidden_state` (B, k, H).

        Raises:
            ValueError: If images and placeholders do not match, if a rationale is to follow texts that are padded on
                the right, if `visual_tokens` come with `pixel_values`, and as [`get_text_features`].
        """
        if self.vlm is None:
            check_no_other(kwargs, "get_multimodal_features")
        attention_mask = checked_mask(input_ids, attention_mask)
        if visual_tokens is None:
            self._check_placeholders(input_ids, pixel_values, boxes)
        else:
            self._check_visual_tokens(visual_tokens, pixel_values, boxes)
        if max_rationale_tokens:
            images = {"pixel_values": pixel_values, "boxes": boxes, "spatial_shapes": spatial_shapes}
            images["visual_tokens"] = visual_tokens
            input_ids, attention_mask = self._with_rationale(
                input_ids, attention_mask, images, max_rationale_tokens, **kwargs
            )
        if self._is_vlm_prompt(pixel_values, boxes):
            kwargs.pop("return_dict", None)
            kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
            kwargs |= {} if spatial_shapes is None else {"spatial_shapes": spatial_shapes}
            outputs = self._read_vlm_prompt(kwargs)
        else:
            inputs_embeds = self.embed_prompt(input_ids, pixel_values, boxes, visual_tokens, spatial_shapes)
            outputs = self._embed_sequences(inputs_embeds, attention_mask)
        modality = "text" if pixel_values is None and visual_tokens is None else "fused"
        outputs.pooler_output = self._calibrated(outputs.pooler_output, modality)
        return outputs

    def _vlm_image_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(I, channels, H, W) whole images -> (I, p, H), what the connector of the VLM makes of them."""
        return self.vlm.image_tokens(self, pixel_values)

    def _is_vlm_prompt(self, pixel_values: torch.Tensor | None, boxes: torch.Tensor | None) -> bool:
        """Images that a VLM sees in its own way; boxes it does not know."""
        return self.vlm is not None and pixel_values is not None and boxes is None

    def _read_vlm_prompt(self, inputs: dict) -> BaseModelOutputWithPooling:
        """What the processor of a VLM makes of B prompts -> read-out of the [EMB] vectors after each of them."""
        self._check_length(inputs["input_ids"].shape[1] + len(self._read_out_embeds()))
        vlm = self.vlm.of(self)
        if self.config.text_attention == "bidirectional":
            if self.config.vlm_attention == "unknown":
                self._refuse_to_show_images()
            with without_layers(self.get_decoder()):
                inputs_embeds = vlm.base_model(**inputs, use_cache=False).last_hidden_state  # (B, L, H)
            return self._embed_sequences(inputs_embeds, inputs["attention_mask"])
        hidden_states = read_prompt(vlm, vlm.base_model, self.get_decoder(), self._read_out_embeds(), inputs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self._read_out(hidden_states)
        )  # (B, k, H), (B, D) or (B, k, D)

    def _refuse_to_show_images(self):
        raise ValueError(
            f"`vlm_attention` is 'unknown': a `{self.config.vlm_config.model_type}` reads prompts with images in a "
            "way of its own, such as in tiles, which packed rows do not; expected texts alone, boxes, or, if it tells "
            "kinds of tokens apart, its `processor` for `from_vlm`."
        )

    @torch.no_grad()
    def _with_rationale(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        images: dict[str, torch.Tensor | None],
        max_rationale_tokens: int,
        **vlm_inputs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) -> (B, L + m) ids and mask, with what the model writes after the text, up to its end token."""
        if any(isinstance(value, torch.Tensor) and value.shape == input_ids.shape for value in vlm_inputs.values()):
            raise ValueError(
                f"`max_rationale_tokens` is {max_rationale_tokens}, but the VLM tells kinds of tokens apart "
                f"({', '.join(vlm_inputs)}); expected 0."
            )
        if type(max_rationale_tokens) is not int or max_rationale_tokens < 0:
            raise ValueError(f"`max_rationale_tokens` is {max_rationale_tokens!r}; expected a whole number from 0 on.")
        has_text = attention_mask.bool().any(-1)  # (B,); of nothing, nothing is written
        if not has_text.any():
            return input_ids, attention_mask
        if not attention_mask[has_text, -1].all():
            raise ValueError("`attention_mask` pads on the right, where a rationale is to follow; pad on the left.")
        answers = self.generate(
            input_ids=input_ids[has_text],
            attention_mask=attention_mask[has_text],
            **images,
            max_new_tokens=max_rationale_tokens,
            do_sample=False,
            **vlm_inputs,
            suppress_tokens=[self.config.image_token_id],
        )[:, input_ids.shape[1] :]  # (., m)
        written = answers.new_zeros(len(input_ids), answers.shape[1])  # (B, m)
        written[has_text] = answers
        end_ids = self.generation_config.eos_token_id
        end_ids = [end_ids] if isinstance(end_ids, int) else end_ids or []
        is_end = torch.isin(written, written.new_tensor(end_ids))  # (B, m)
        is_rationale = (is_end.cumsum(-1) == 0) & has_text[:, None]  # (B, m)
        return torch.cat([input_ids, written], dim=1), torch.cat([attention_mask, is_rationale.to(attention_mask)], 1)

    def _has_placeholders(self, input_ids: torch.Tensor) -> bool:
        """Whether it is a prompt; a compiled graph is for prompts or for texts, and refuses the other."""
        found = _holds(input_ids, self.config.image_token_id)
        if torch.compiler.is_compiling():
            torch_compilable_check((input_ids == self.config.image_token_id).any() == found, "")
        return found

    def _check_placeholders(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, boxes: torch.Tensor | None
    ):
        """Tokens that there are not, and images that are missing altogether; how many there are is compared where they
        are embedded."""
        check_ids(input_ids, self.get_input_embeddings().weight.shape[0], self.config.image_token_id)
        if pixel_values is None and boxes is not None:
            raise ValueError("`boxes` came without `pixel_values`; expected the images they lie in.")
        if (
            pixel_values is None
            and not torch.compiler.is_compiling()
            and (input_ids == self.config.image_token_id).any()
        ):
            raise ValueError("`input_ids` holds image placeholders, but there are no `pixel_values`; expected images.")

    def embed_prompt(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        visual_tokens: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Look up what the language model reads of a prompt: the `inputs_embeds` of `forward` and `generate`.

        Args:
            input_ids: (B, L) with n placeholders for each image, or for each box if there are boxes.
            pixel_values, boxes, visual_tokens, spatial_shapes: Of the images, see [`get_multimodal_features`].

        Returns:
            (B, L, H) vectors of the tokens, with visual tokens in the place of their placeholders.

        Raises:
            ValueError: If images and placeholders do not match, or for shapes that do not fit.
        """
        placeholders = input_ids == self.config.image_token_id  # (B, L)
        # Some VLMs have no row in their vocabulary for it.
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
        if pixel_values is not None:
            tokens = self._visual_tokens(pixel_values, boxes, spatial_shapes)
            visual_tokens = tokens if boxes is None else tokens[is_box(boxes)]  # (units, n, C)
        if visual_tokens is None:
            return inputs_embeds
        tokens = visual_tokens.flatten(0, 1)  # (units * n, C)
        num_tokens, num_units = tokens.shape[0], visual_tokens.shape[0]
        if torch.compiler.is_compiling():
            torch_compilable_check(placeholders.sum() == num_tokens, "")
        elif placeholders.sum() != num_tokens:
            raise self._wrong_number(int(placeholders.sum()), num_units)
        visual_embeds = self.token_projection(tokens).to(inputs_embeds.dtype)  # (units * n, H)
        return inputs_embeds.masked_scatter(placeholders[..., None], visual_embeds)

    def _wrong_number(self, placeholders: int, units: int) -> ValueError:
        n = self.config.num_visual_tokens
        return ValueError(
            f"`input_ids` holds {placeholders} image placeholders, but `pixel_values` (and `boxes`) give {units} "
            f"images or boxes; expected {n} placeholders for each, {n * units} in all."
        )

    # Everything at once

    @can_return_tuple
    @documents_text_columns
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        boxes: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.FloatTensor | None = None,
        return_loss: bool = False,
        image_ids: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_contrastive_batch: bool = False,
        spatial_shapes: torch.LongTensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        patch_features: torch.FloatTensor | None = None,
        visual_tokens: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MMGEMOutput | BaseModelOutputWithPooling:
        """Embed, compare, generate or train, by what is given:

        1. `pixel_values` alone: image features, as [`get_image_features`].
        2. `input_ids` with placeholders (or no `pixel_values`): next-token `logits`; with `labels` the language
           modelling `loss`. This is what `generate` calls.
        3. `input_ids` without placeholders and `pixel_values`: every image against every text, `logits_per_image`,
           `logits_per_text`, `image_embeds`, `text_embeds`, as in CLIP.
        4. the same with `return_loss`: the joint loss too. The vision tower runs once over the images and the language
           model once over packed rows, where each text stands twice: alone, to be embedded, and after the visual
           tokens of its image, to be generated.

        Args:
            input_ids: (B, L) prompts or (T, L) texts.
            pixel_values: (I, 3, H, W); with `spatial_shapes` (I, P, patch * patch * 3).
            attention_mask: Like `input_ids`, 1 for tokens, 0 for padding on either side.
            boxes: (I, R, 4) xyxy in [0, 1] of the model's view; rows of zeros are padding.
            labels: Like `input_ids`, token ids to be generated, -100 elsewhere. In meaning 4 the default is every
                token; a row of -100 is only embedded. An end-of-sequence token is appended to each generated text.
            return_loss: Compute the joint loss.
            image_ids: (I,) identity of each image, so that copies of one image are never each other's negatives; by
                default every image is different.
            num_items_in_batch: Tokens to divide the caption loss by, over all processes and accumulation steps. Then
                `loss` is this batch's share in the mean of the joint losses of a step, as transformers' Trainer, which
                counts the `labels`, adds it up.
            return_contrastive_batch: Leave the contrastive loss to the caller, who finds its ingredients, of this
                process and with gradients, in `contrastive_batch`; `loss` is the caption loss then.
            spatial_shapes: (I, 2), see [`get_image_features`].
            pixel_attention_mask: Says the same as `spatial_shapes`; only VLMs read it.
            patch_features: (I, C, rows, columns), in meaning 4 instead of `pixel_values`: the features of the vision
                tower, as `patch_grid` of a frozen one gave them. It is not run.
            visual_tokens: (units, n, C), in meaning 2 instead of `pixel_values`, see [`get_multimodal_features`].
            logits_to_keep: In meaning 2 the number of last tokens that get `logits`, or (N,) their places; by default
                all get them. `generate` asks for those of the last token.
            position_ids, past_key_values, inputs_embeds: Handed to the language model.
            kwargs: In meaning 2 handed to the language model; in meaning 4 the columns of [`TextRows`], and no other.
            {columns}

        Raises:
            TypeError: In meaning 3, for an argument that is none.
            ValueError: If numbers or shapes do not fit together, or a column is unknown.
        """
        text_columns = {name: kwargs.pop(name) for name in TEXT_COLUMNS if name in kwargs}
        if not return_loss:
            _refuse_text_columns(text_columns | {"patch_features": patch_features})
        elif visual_tokens is not None:
            raise ValueError("`visual_tokens` came with `return_loss=True`; expected `pixel_values`, to train on.")
        if visual_tokens is not None:
            self._check_visual_tokens(visual_tokens, pixel_values, boxes)
        if input_ids is None and inputs_embeds is None:
            if pixel_values is None:
                raise ValueError("`input_ids` and `pixel_values` are both None; expected at least one of them.")
            return self.get_image_features(pixel_values, boxes, spatial_shapes, return_dict=True)
        if inputs_embeds is not None:
            check_vectors(inputs_embeds, self.get_input_embeddings().embedding_dim, input_ids, pixel_values)

        if not return_loss and (input_ids is None or pixel_values is None or self._has_placeholders(input_ids)):
            cache = past_key_values
            if not self._is_paged(kwargs.get("cache")):
                cache = kwargs.pop("cache", past_key_values)  # its name from transformers 5.24 on
            if inputs_embeds is None and self.vlm is not None and boxes is None:
                given = {"spatial_shapes": spatial_shapes, "pixel_attention_mask": pixel_attention_mask}
                kwargs |= {name: value for name, value in given.items() if value is not None}
                kwargs |= {"input_ids": input_ids, "pixel_values": pixel_values}
            elif inputs_embeds is None:
                is_first = torch.compiler.is_compiling() or not self._has_begun(cache)
                if is_first and visual_tokens is None:
                    self._check_placeholders(input_ids, pixel_values, boxes)  # later the model may have written some
                images = {"pixel_values": pixel_values, "boxes": boxes, "spatial_shapes": spatial_shapes}
                inputs_embeds = self.embed_prompt(input_ids, **images, visual_tokens=visual_tokens)  # (B, L, H)
                if not torch.compiler.is_compiling() and not inputs_embeds.numel():
                    raise ValueError(
                        f"`input_ids` has shape {tuple(input_ids.shape)}; expected tokens of each prompt."
                    )
            if labels is not None:
                shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
                rows = self.get_input_embeddings().num_embeddings
                check_labels(labels, tuple(shape), rows, self.config.image_token_id)
                kwargs["labels"], kwargs["num_items_in_batch"] = labels, num_items_in_batch
            if attention_mask is not None and inputs_embeds is not None and self._is_state_space:
                attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]  # a state needs no mask of its past
            if self._takes_logits_to_keep:
                kwargs["logits_to_keep"] = logits_to_keep
            writer = self.language_model if self.vlm is None else self.vlm.of(self)
            outputs = writer(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **({} if cache is None else {self._cache_argument: cache}),
                **kwargs,
            )
            known = MMGEMOutput.__dataclass_fields__
            output = MMGEMOutput(**{name: value for name, value in outputs.items() if name in known})
            output["cache" if "cache" in known else "past_key_values"] = outputs.get(self._cache_argument)
            if not self._takes_logits_to_keep:
                kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
                output["logits"] = output.logits[:, kept]
            return output

        attention_mask = checked_mask(input_ids, attention_mask, allow_empty=return_loss)
        if return_loss:
            if self.config.embedding_prompt_ids is not None or self.calibrator is not None:
                raise ValueError(
                    "`return_loss` is given, but the embeddings are read by a prompt or calibrated, which comes after "
                    "training; expected a model without `embedding_prompt_ids` and `calibrated_modalities`."
                )
            if kwargs:
                raise ValueError(
                    f"`{next(iter(kwargs))}` is no column of the texts of a batch; expected some of "
                    f"{', '.join(TEXT_COLUMNS)}."
                )
            shown = pixel_values if patch_features is None else patch_features
            num_images = 0 if shown is None else len(shown)
            self._check_patch_features(patch_features, pixel_values)
            if pixel_values is not None:
                check_pixels(pixel_values)
            check_ids(input_ids, self.get_input_embeddings().num_embeddings, self.config.image_token_id)
            check_boxes(boxes, num_images)
            text_columns |= {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
            rows = TextRows.from_columns(text_columns, num_images, boxes)
            if image_ids is None:
                image_ids = default_image_ids(num_images, input_ids.device)
            if image_ids.shape != (num_images,):
                raise ValueError(f"`image_ids` has shape {tuple(image_ids.shape)}; expected ({num_images},).")
            return self._joint_forward(
                rows,
                pixel_values,
                boxes,
                image_ids,
                num_items_in_batch,
                return_contrastive_batch,
                spatial_shapes,
                patch_features,
            )
        if labels is not None or boxes is not None:
            raise ValueError(
                f"`{'boxes' if labels is None else 'labels'}` came with images and texts that are only compared; "
                "expected image placeholders in `input_ids` to generate from, or `return_loss=True` to train. Boxes "
                "are embedded by `get_image_features`."
            )
        if self.vlm is None:
            check_no_other(kwargs, "forward")
        image_features = self.get_image_features(pixel_values, spatial_shapes=spatial_shapes).pooler_output
        image_embeds = F.normalize(image_features, dim=-1)  # (I, D)
        text_embeds = F.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)  # (T, D)
        return self._pair_output(image_embeds, text_embeds)

    def _check_patch_features(self, patch_features: torch.Tensor | None, pixel_values: torch.Tensor | None):
        if patch_features is None:
            return
        if pixel_values is not None or self.vlm is not None:
            raise ValueError(
                "`patch_features` came with `pixel_values`, or for a model that began as a VLM; expected them alone."
            )
        shape, width = tuple(patch_features.shape), self.config.grid.hidden_size
        if len(shape) != 4 or shape[1] != width or 0 in shape:
            raise ValueError(f"`patch_features` has shape {shape}; expected (I, {width}, rows, columns).")

    def _check_visual_tokens(self, visual_tokens: torch.Tensor, pixel_values, boxes):
        if pixel_values is not None or boxes is not None or self.vlm is not None:
            raise ValueError(
                "`visual_tokens` came with `pixel_values` or `boxes`, or for a model that began as a VLM; expected "
                "them alone."
            )
        n, width = self.config.num_visual_tokens, self.config.grid.hidden_size
        if visual_tokens.ndim != 3 or tuple(visual_tokens.shape[1:]) != (n, width):
            raise ValueError(
                f"`visual_tokens` has shape {tuple(visual_tokens.shape)}; expected (units, {n}, {width})."
            )

    def inverse_temperature(self) -> torch.Tensor:
        """The factor of similarities where they are compared, as in CLIP.

        Returns:
            A scalar, at most 100: the exponential of `logit_scale`.
        """
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().squeeze()

    def _pair_output(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, **fields) -> MMGEMOutput:
        logits_per_image = self.inverse_temperature() * similarity(text_embeds, image_embeds).T  # (I, T)
        if self.logit_bias is not None:
            logits_per_image = logits_per_image + self.logit_bias
        return MMGEMOutput(
            **fields,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )

    # Generation and saving

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args,
        embedding_tokens: torch.Tensor | None = None,
        image_similarity_weight: float | None = None,
        **kwargs,
    ):
        """Write captions and answers; `GenerationMixin.generate`, which see, and beside it from memory:

        Args:
            inputs: (B, L) token ids, also called `input_ids`.
            visual_tokens: (units, n, C), instead of `pixel_values`: the `last_hidden_state` of
                [`get_image_features`] for the image of each placeholder. Several questions about an image repeat its
                tokens, and the vision tower runs over it once. It is a keyword argument.
            embedding_tokens: (B, j, H), j from 1 to k: the `last_hidden_state` of [`get_multimodal_features`] for
                images, or the first j states of it. They stand where the image would; neither an image nor the vision
                tower is needed. `input_ids` then holds the question, padded on the left, and may be left out for a
                caption, if the tokenizer adds no [BOS]; or a prompt with one image placeholder, in whose place the
                memory stands.
            image_similarity_weight: 0 or more. Above 0, the model embeds the captions of all beams, and those are
                returned whose score, plus the weighted similarity with the image (or box), is highest; see
                [`rank_candidates`]. Prompts with words or with several images are not ranked. By default it is that of
                the generation configuration, which passes over what cannot be ranked, such as a single beam.

        Writing ends at the latest where the positions of the language model do.

        Returns:
            Token ids; with `embedding_tokens` only the new ones.

        Raises:
            ValueError: If `embedding_tokens` or `visual_tokens` are not those of this model, or come with images; if
                images come with a prompt that has no place for them; for a number out of its range, such as
                `num_beams=0`; if the prompt is so long that nothing can be written; if captions are to be ranked of
                which there is but one, or no image.
        """
        settings = args[0] if args else kwargs.get("generation_config")
        if settings is not None and not isinstance(settings, GenerationConfig):
            raise TypeError(f"`generation_config` is {settings!r:.100}; expected a `GenerationConfig`.")
        given = ({} if settings is None else settings.to_diff_dict()) | kwargs
        given |= {} if image_similarity_weight is None else {"image_similarity_weight": image_similarity_weight}
        check_generation(given, self.get_input_embeddings().num_embeddings)
        if given.get("prompt_lookup_num_tokens") or given.get("assistant_model") is not None:
            # What is drafted is read like a prompt, and would ask for images.
            kwargs["suppress_tokens"] = [*(given.get("suppress_tokens") or []), self.config.image_token_id]
        if given.get("max_length") is not None and given.get("max_new_tokens") is None:
            kwargs["max_new_tokens"] = None  # rather than that of the model, which would take precedence
        images = {name: kwargs.get(name) for name in ("visual_tokens", "pixel_values", "boxes")}
        if images["visual_tokens"] is not None:
            self._check_visual_tokens(*images.values())
        default = (self.generation_config if settings is None else settings).max_new_tokens

        def fitted(prompt: torch.Tensor, mask: torch.Tensor | None) -> dict:
            length = (
                int(mask.sum(-1).max()) if mask is not None and mask.shape == prompt.shape[:2] else prompt.shape[1]
            )
            return kwargs | fit_length(kwargs, default, length, self.config.max_sequence_length)

        if embedding_tokens is None:
            prompt_ids = kwargs.get("input_ids", inputs)
            has_images = kwargs.get("pixel_values") is not None and kwargs.get("inputs_embeds") is None
            if has_images and (prompt_ids is None or not (prompt_ids == self.config.image_token_id).any()):
                raise ValueError(
                    "`pixel_values` came, but `input_ids` has no image placeholders; expected a prompt with one "
                    "`<image>` for each image, as `processor.prompt(text)` writes it."
                )
            # A VLM writes in its own way, but knows no boxes.
            writes_itself = self.vlm is not None and kwargs.get("boxes") is None
            generate = self.vlm.of(self).generate if writes_itself else super().generate
            prompt = kwargs.get("inputs_embeds") if prompt_ids is None else prompt_ids
            if prompt is not None and prompt.ndim > 1 and len(prompt):
                kwargs = fitted(prompt, kwargs.get("attention_mask"))
            settings = self.generation_config.to_dict() | given | {"input_ids": prompt_ids}
            if weight := settings.get("image_similarity_weight"):
                obstacle = why_not_ranked(self, settings)
                mask = None if obstacle else checked_mask(prompt_ids, kwargs.get("attention_mask"))
                if mask is not None and is_caption_prompt(self, prompt_ids, mask).any():
                    images |= {name: kwargs.pop(name, None) for name in IMAGES_OF_PROMPTS}
                    tokens = images["visual_tokens"]
                    if tokens is None:  # by a method for which FSDP gathers parameters
                        pixels, boxes = images["pixel_values"], images["boxes"]
                        features = self.get_image_features(pixels, boxes, images["spatial_shapes"])
                        tokens = features.last_hidden_state  # (B, n, C) or (B, R, n, C)
                        tokens = tokens if boxes is None else tokens[is_box(boxes)]  # (units, n, C)
                    kwargs |= {"input_ids": prompt_ids, "attention_mask": mask, "visual_tokens": tokens}
                    return generate_ranked(self, partial(generate, None, *args), weight, settings, kwargs)
                if obstacle is not None and image_similarity_weight is not None:
                    raise ValueError(
                        f"`image_similarity_weight` is {weight}, but {obstacle}; expected 0, or beams of captions."
                    )
            return generate(inputs, *args, **kwargs)
        input_ids = kwargs.pop("input_ids", inputs)
        if given := [name for name, value in images.items() if value is not None]:
            raise ValueError(f"`embedding_tokens` and `{given[0]}` are both given; expected one of them.")
        embeds, mask = self._embed_recall(embedding_tokens, input_ids, kwargs.pop("attention_mask", None))
        kwargs = fitted(embeds, mask)
        return super().generate(inputs_embeds=embeds, attention_mask=mask, *args, **kwargs)  # noqa: B026

    def _embed_recall(
        self, embedding_tokens: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[BOS], memory (B, j, H), text (B, L) -> (B, 1 + j + L, H) with the mask, (B, 1 + j + L)."""
        shape, (k, hidden_size) = tuple(embedding_tokens.shape), self.embedding_tokens.shape
        if len(shape) != 3 or not 1 <= shape[1] <= k or shape[2] != hidden_size:
            raise ValueError(f"`embedding_tokens` has shape {shape}; expected (B, 1 to {k}, {hidden_size}).")
        if input_ids is None:
            input_ids = torch.zeros(shape[0], 0, dtype=torch.long, device=embedding_tokens.device)
        attention_mask = checked_mask(input_ids, attention_mask)
        if len(input_ids) != shape[0]:
            raise ValueError(
                f"`embedding_tokens` holds {shape[0]} memories for {len(input_ids)} texts; expected as many."
            )
        (batch, length), j = input_ids.shape, shape[1]
        is_place = attention_mask.bool() & (input_ids == self.config.image_token_id)  # (B, L)
        has_place = is_place.sum(-1, keepdim=True) > 0  # (B, 1)
        if (is_place.sum(-1) > 1).any():
            raise ValueError("`input_ids` holds several image placeholders beside `embedding_tokens`; expected one.")
        bos_token_id = self.config.text_config.bos_token_id
        is_bos = is_first_token(input_ids, attention_mask, bos_token_id) & ~has_place  # (B, L)
        has_bos = is_bos.sum(-1, keepdim=True) > 0  # (B, 1)
        bos = torch.full_like(has_bos, max(first_token_id(bos_token_id), 0), dtype=torch.long)
        words = self.get_input_embeddings()(torch.cat([bos, input_ids.masked_fill(is_place, 0)], dim=1))
        embeds = torch.cat([words[:, :1], embedding_tokens.to(words.dtype), words[:, 1:]], dim=1)
        is_memory = torch.ones_like(embedding_tokens[..., 0], dtype=torch.bool)  # (B, j)
        is_word = attention_mask.bool() & ~is_bos & ~is_place  # (B, L)
        mask = torch.cat([has_bos, is_memory, is_word], dim=1).long()  # (B, 1 + j + L)
        # The memory goes to its place, or else after [BOS]; each word leaves room for it. What is masked goes to the
        # left: generation reads the next token at the last place.
        word = torch.arange(length, device=mask.device)  # (L,)
        place = torch.where(has_place, (is_place * word).sum(-1, keepdim=True), -1)  # (B, 1)
        memory_key = (place + 1) * (j + 1) + torch.arange(j, device=mask.device)  # (B, j)
        word_key = ((word + 1) * (j + 1) + j).expand(batch, -1)  # (B, L)
        key = torch.cat([torch.full_like(place, -1), memory_key, word_key], dim=1)  # (B, 1 + j + L)
        order = torch.where(mask.bool(), key, key - 2 * (length + 2) * (j + 1)).argsort(dim=1)
        return embeds.gather(1, order[..., None].expand_as(embeds)), mask.gather(1, order)

    def _supports_default_dynamic_cache(self) -> bool:
        # A state-space model makes its states itself; the library's cache asks for a length that they do not have.
        return not self._is_state_space and super()._supports_default_dynamic_cache()

    def create_masks_for_generate(self, *, attention_mask, **kwargs):
        """What `generate` calls to make masks of attention, which state-space models have no use for."""
        if self._is_state_space:
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, **kwargs)

    def _expand_inputs_for_generation(self, expand_size: int = 1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Every copy of a prompt, for a beam or a further answer, gets the images or boxes of this prompt."""
        images = {name: kwargs.pop(name) for name in IMAGES_OF_PROMPTS if kwargs.get(name) is not None}
        if expand_size > 1 and images:
            if "boxes" in images:  # each in an image of its own, since those of an image may be of several prompts
                image, box = is_box(images["boxes"]).nonzero(as_tuple=True)  # (units,)
                boxes = images.pop("boxes")[image, box][:, None]  # (units, 1, 4)
                images = {name: tensor[image] for name, tensor in images.items()} | {"boxes": boxes}
            n, units = self.config.num_visual_tokens, len(next(iter(images.values())))
            counts = (input_ids == self.config.image_token_id).sum(-1)  # (B,) placeholders
            if (counts % n).any() or counts.sum() != n * units:
                raise self._wrong_number(int(counts.sum()), units)
            own = torch.arange(units, device=input_ids.device).split((counts // n).tolist())
            of_copies = torch.cat([units for units in own for _ in range(expand_size)])
            images = {name: tensor[of_copies.to(tensor.device)] for name, tensor in images.items()}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | images

    def _is_paged(self, cache) -> bool:
        """Whether it is that of continuous batching, for many sequences, which attention layers take as `cache`."""
        return cache is not None and not self._is_state_space and not hasattr(cache, "get_seq_length")

    def _has_begun(self, cache) -> bool:
        """Whether a cache holds the beginning of the sequences; its images are read then."""
        # States have no length, and are there from the second step on.
        return cache is not None and (self._is_state_space or bool(cache.get_seq_length()))

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # by whose parameters the library goes
    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As of every model, but what decides is where the images stand: they are read with the first tokens, by a
        model that drafts for another too, and with a cache that goes on before them, no more."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # the former from transformers 5.24 on
        has_begun = self._has_begun(cache) if cache is not None and not cache.is_compileable else None
        if kwargs.get("use_cache", True):
            if has_begun is False:
                kwargs["is_first_iteration"] = True
            elif not kwargs.get("is_first_iteration"):
                kwargs.pop("visual_tokens", None)
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        ids = inputs.get("input_ids")
        if has_begun and ids is not None and not _holds(ids, self.config.image_token_id):
            inputs = {name: value for name, value in inputs.items() if name not in IMAGES_OF_PROMPTS}
        return inputs

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """Continuous batching, as of every model, for texts: the library hands it no images.

        Raises:
            ValueError: If a prompt has places for images.
        """
        for row, prompt_ids in enumerate(inputs):
            if self.config.image_token_id in prompt_ids:
                raise ValueError(
                    f"`inputs[{row}]` holds image placeholders; expected texts alone, as continuous batching takes no "
                    "images. `generate` does."
                )
        return super().generate_batch(inputs, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """As of every model; and what else makes a Hub folder complete: the code with the pipeline, the settings of
        sentence-transformers, and, unless the folder has one, the processor of where the model was loaded from.

        Raises:
            ValueError: If the model is calibrated and its configuration does not say so.
        """
        # The Hub folder carries the pipeline because it is imported here: files are collected by their imports.
        from .pipeline_mmgem import MMGEMImageToTextPipeline  # noqa: F401

        if self.calibrator is not None and self.config.calibrated_modalities is None:
            raise ValueError(
                "`calibrated_modalities` of the configuration is None, but the model has a calibrator, which would be "
                f"lost; expected {list(self.calibrator.modalities)}."
            )
        self.generation_config._from_model_config = False  # or `image_similarity_weight` is not read again
        if is_main_process:  # before the model itself, after which the folder may be pushed
            write_sentence_transformers_files(Path(save_directory), self.config, self.embedding_dim)
            self._save_processor(Path(save_directory))
        return super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _save_processor(self, folder: Path):
        if not self.name_or_path or (folder / PROCESSOR_NAME).exists():
            return
        if self._loaded_processor[0] != self.name_or_path:  # once, and not for each checkpoint of a run
            self._loaded_processor = self.name_or_path, self._load_processor()
        if self._loaded_processor[1] is not None:
            self._loaded_processor[1].save_pretrained(folder)

    def _load_processor(self):
        """That of where the model was loaded from; None if there is none."""
        # Code of the Hub is trusted where this is such code; where the package is installed, it has the processor.
        is_hub_code = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
        where = {"revision": getattr(self.config, "_commit_hash", None), "trust_remote_code": is_hub_code}
        try:
            return AutoProcessor.from_pretrained(self.name_or_path, **where)
        except (OSError, ValueError):
            return None


@torch.compiler.assume_constant_result
def _holds(input_ids: torch.Tensor, token_id: int) -> bool:
    return bool((input_ids == token_id).any())


def _refuse_text_columns(text_columns: dict):
    given = [name for name, value in text_columns.items() if value is not None]
    if given:
        raise ValueError(f"`{given[0]}` came without `return_loss=True`; expected it only where the joint loss is.")


# `generate` asks for it at every token, and taking a signature apart takes longer than the checks of a token.
MMGEMModel.forward.__signature__ = signature(MMGEMModel.forward)
MMGEMModel.register_for_auto_class("AutoModel")

__all__ = ["MMGEMModel", "MMGEMOutput"]
