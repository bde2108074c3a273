"""
MM-GEM: one model that embeds images, regions and texts, and writes about them.

    image -> vision tower -> patch grid -> PoolAggregator -> n visual tokens -+- mean -> image_projection -> embedding
                                                                              +- token_projection -> prefix of the LLM
    text  -> LLM -> read-out at the appended [EMB] vectors -> text_projection -> embedding

Multimodal Generative Embedding Model, https://arxiv.org/abs/2405.19333.
"""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_mmgem import MMGEMConfig
from .contrastive import ContrastiveObjective
from .contrastive_batch import (
    IMAGE,
    REGION,
    ContrastiveBatch,
    default_image_ids,
    ids_of_regions,
    token_row_ids,
)
from .packing import PackedLayout
from .pool_aggregator import PoolAggregator

IGNORED_LABEL = -100
MAX_LOGIT_SCALE = math.log(100)
DEFAULT_MAX_NEW_TOKENS = 128
LOGITS_AT_ONCE = 2**24  # vocabulary logits in memory; a caption loss with more goes chunk by chunk
LOGIT_CHANGES = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # of Granite, Cohere, Gemma 2


@dataclass
class MMGEMOutput(ModelOutput):
    """
    What `forward` returns for a prompt (`logits`, ...) or for images and texts (`logits_per_image`, ...).

    Args:
        loss: scalar. Language modelling loss of a prompt with `labels`; caption + contrastive loss with `return_loss`.
        caption_loss: scalar, mean (or sum / `num_items_in_batch`) over the caption tokens.
        contrastive_loss: scalar, InfoNCE of images and texts, plus that of boxes and texts.
        contrastive_batch: what a contrastive loss is computed from, of this process; with `return_loss`.
        image_norm, text_norm: scalars, mean length of the embeddings before they are normalised; with `return_loss`.
        logits: (B, L, vocabulary) next-token scores.
        logits_per_image: (B, T) scaled cosine similarity of every image with every text.
        logits_per_text: (T, B), its transpose.
        image_embeds: (B, D) unit vectors.
        text_embeds: (T, D) unit vectors.
        past_key_values: cache of the language model.
        hidden_states, attentions: of the language model, per layer, on request.
    """

    loss: torch.FloatTensor | None = None
    caption_loss: torch.FloatTensor | None = None
    contrastive_loss: torch.FloatTensor | None = None
    contrastive_batch: ContrastiveBatch | None = None
    image_norm: torch.FloatTensor | None = None
    text_norm: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class MMGEMModel(PreTrainedModel, GenerationMixin):
    """
    One class that embeds and generates; see [`MMGEMConfig`] for its parts and [`MMGEMModel.from_towers`] for composing
    it from pretrained ones.

    - `get_image_features`: images, or boxes in them, to embeddings. No layer of the language model runs.
    - `get_text_features`, `get_multimodal_features`: texts, or images with texts, to embeddings. No vocabulary head.
    - `generate`: captions and answers, from `input_ids` with `<image>` placeholders and `pixel_values`.
    - `forward`: CLIP's meaning for images and texts, LLaVA's for prompts; see there.

    Raises:
        NotImplementedError: for `embedding_pooling="multi_vector"`.
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
        if config.embedding_pooling == "multi_vector":
            raise NotImplementedError(
                "`embedding_pooling` is 'multi_vector', which is not there yet; expected 'last' or 'mean'."
            )
        vision_size, text_size = config.vision_config.hidden_size, config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.pool_aggregator = PoolAggregator(
            vision_size, config.vision_config.num_attention_heads, config.num_visual_tokens
        )
        self.image_projection = nn.Sequential(
            nn.LayerNorm(vision_size), nn.Linear(vision_size, config.projection_dim, bias=False)
        )
        self.text_projection = nn.Linear(text_size, config.projection_dim, bias=False)
        self.token_projection = nn.Sequential(
            nn.LayerNorm(vision_size), nn.Linear(vision_size, text_size), nn.GELU(), nn.Linear(text_size, text_size)
        )
        self.embedding_tokens = nn.Parameter(torch.empty(config.num_embedding_tokens, text_size))
        self.logit_scale = nn.Parameter(torch.tensor([config.logit_scale_init_value]))
        has_bias = config.logit_bias_init_value is not None
        self.logit_bias = nn.Parameter(torch.tensor([config.logit_bias_init_value])) if has_bias else None
        # Not to be guessed from the class name: the Trainer counts labels by it, and full-graph compile needs it.
        self.loss_type = "ForCausalLM"
        self.post_init()
        # Towers list layers of their siblings too; FSDP expects to find each.
        self._no_split_modules = sorted(set(self._no_split_modules) & {type(m).__name__ for m in self.modules()})
        # The library's default of 20 tokens counts the prompt, which an image alone fills.
        self.generation_config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        # Not by `isinstance(module, PoolAggregator)`: modules without parameters of their own are passed over.
        if module is self.pool_aggregator.output:
            init.zeros_(module.weight)
            init.zeros_(module.bias)
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
        **config_kwargs,
    ) -> "MMGEMModel":
        """
        Compose pretrained towers: `MMGEMModel.from_towers("openai/clip-vit-large-patch14", "TinyLlama/...")`.

        Args:
            vision: Hub name or folder of a vision encoder with a patch grid, or of a dual encoder that contains one
                (CLIP, SigLIP); or such an encoder itself.
            text: Hub name or folder of a causal language model, or the model itself.
            image_token_id: id of `<image>`. By default the id that `MMGEMProcessor.from_towers` gives it: the next
                free one of the tokenizer of `text`, or, for a model object, the next row of its vocabulary.
            config_kwargs: further fields of [`MMGEMConfig`].

        Returns:
            The composed model; towers as they were, projections and aggregator fresh.

        Raises:
            ValueError: if the vision tower has no patch grid.
        """
        if isinstance(vision, str):
            vision_config = AutoConfig.from_pretrained(vision)
            vision_config = getattr(vision_config, "vision_config", vision_config)
            vision = AutoModel.from_pretrained(vision, config=vision_config)
        if isinstance(text, str):
            if image_token_id is None:
                tokenizer = AutoTokenizer.from_pretrained(text)
                tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
                image_token_id = tokenizer.convert_tokens_to_ids("<image>")
            text = AutoModelForCausalLM.from_pretrained(text)
        vocabulary_size = text.get_input_embeddings().num_embeddings
        image_token_id = vocabulary_size if image_token_id is None else image_token_id
        if image_token_id >= vocabulary_size:
            text.resize_token_embeddings(image_token_id + 1, mean_resizing=False)

        config = cls.config_class(
            vision_config=vision.config.to_dict(),
            text_config=text.config.to_dict(),
            image_token_id=image_token_id,
            **config_kwargs,
        )
        model = cls(config)
        model.vision_tower.load_state_dict(vision.state_dict())
        model.language_model.load_state_dict(text.state_dict())
        model.to(text.dtype)
        model.generation_config = text.generation_config
        if model.generation_config.max_new_tokens is None:
            model.generation_config.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
        model.eval()
        with torch.no_grad():
            height, width = _pair(config.vision_config.image_size)
            model._patch_grid(torch.zeros(1, config.vision_config.num_channels, height, width, dtype=model.dtype))
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_decoder(self, modality: str | None = None) -> nn.Module:
        return self.vision_tower if modality == "image" else self.language_model.get_decoder()

    # Vision

    def _patch_grid(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) pixels -> (B, C, H / patch, W / patch) features of the vision tower."""
        vision_config = self.config.vision_config
        patch_height, patch_width = _pair(vision_config.patch_size)
        if pixel_values.ndim != 4 or len(pixel_values) == 0 or pixel_values.shape[1] != vision_config.num_channels:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (B, {vision_config.num_channels}, H, "
                "W) with B at least 1."
            )
        (batch, _, height, width), pixel_values = pixel_values.shape, pixel_values.to(self.vision_tower.dtype)
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"`pixel_values` shows images of {height} x {width}; expected multiples of the patch size "
                f"{patch_height} x {patch_width}."
            )
        rows, columns = height // patch_height, width // patch_width
        accepted = inspect.signature(self.vision_tower.forward).parameters
        if "spatial_shapes" in accepted:  # SigLIP2 (NaFlex) takes flattened patches
            patches = pixel_values.unfold(2, patch_height, patch_height).unfold(3, patch_width, patch_width)
            patches = patches.permute(0, 2, 3, 4, 5, 1).reshape(
                batch, rows * columns, -1
            )  # (B, P, ph * pw * channels)
            hidden_states = self.vision_tower(
                patches,
                pixel_attention_mask=patches.new_ones(batch, rows * columns, dtype=torch.long),
                spatial_shapes=torch.tensor([[rows, columns]] * batch, device=patches.device),
            ).last_hidden_state
        else:
            is_native_size = (height, width) == _pair(vision_config.image_size)
            resizable = not is_native_size and "interpolate_pos_encoding" in accepted
            hidden_states = self.vision_tower(
                pixel_values, **({"interpolate_pos_encoding": True} if resizable else {})
            ).last_hidden_state
        if hidden_states.ndim != 3 or hidden_states.shape[1] < rows * columns:
            raise ValueError(
                f"The vision tower `{vision_config.model_type}` answers images of {height} x {width} with features of "
                f"shape {tuple(hidden_states.shape)}; expected a patch grid of {rows} x {columns} tokens."
            )
        # Class and register tokens, where there are any, stand in front of the patches.
        patches = hidden_states[:, -rows * columns :]  # (B, P, C)
        return patches.transpose(1, 2).unflatten(2, (rows, columns))  # (B, C, rows, columns)

    def _visual_tokens(self, pixel_values: torch.Tensor, boxes: torch.Tensor | None) -> torch.Tensor:
        """-> (B, n, C), or (B, R, n, C) with boxes."""
        grid = self._patch_grid(pixel_values)  # (B, C, rows, columns)
        _check_boxes(boxes, len(grid))
        return self.pool_aggregator(grid, boxes)

    def _embed_visual_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """(..., n, C) -> (..., D)"""
        return self.image_projection(tokens.mean(dim=-2))

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, boxes: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Embed images, or boxes in them. The language model is not run.

        Args:
            pixel_values: (B, 3, H, W) as the processor gives them.
            boxes: (B, R, 4) xyxy in [0, 1] of the model's view; rows of zeros are padding.

        Returns:
            `pooler_output` (B, D), or (B, R, D) with boxes, unnormalised, zero for padding boxes;
            `last_hidden_state` (B, n, C) or (B, R, n, C), the visual tokens that it is the mean of.

        Raises:
            ValueError: for shapes that do not fit.
        """
        tokens = self._visual_tokens(pixel_values, boxes)
        embeds = self._embed_visual_tokens(tokens)
        if boxes is not None:
            embeds = embeds * _is_box(boxes)[..., None]  # (B, R, D)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=embeds)

    # Text

    def _run_decoder(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        bidirectional: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The language model without its vocabulary head.

        Args:
            inputs_embeds: (B, L, H).
            position_ids: (B, L); restarting at 0 where a new sequence begins, if rows are packed.
            attention_mask: (B, L), or None for packed rows.
            bidirectional: (B, L), a number per sequence whose tokens see each other both ways, -1 for causal tokens.

        Returns:
            (B, L, H) hidden states after the final norm.
        """
        if bidirectional is not None:
            attention_mask = create_causal_mask(
                config=self.language_model.get_decoder().config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=None,
                position_ids=position_ids,
                block_sequence_ids=bidirectional,
                allow_is_causal_skip=False,
            )
        # Packed rows are recognised by their position_ids only without a cache, which must be said.
        return self.language_model.get_decoder()(
            inputs_embeds=inputs_embeds, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    def _check_length(self, length: int):
        limit = getattr(self.config.text_config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"`input_ids` with its image, [EMB] and end tokens is {length} tokens long; the language model takes "
                f"at most {limit}. Truncate the text when tokenizing."
            )

    def _read_out(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, k, H) states of the [EMB] vectors -> (T, D)"""
        pooled = hidden_states[:, -1] if self.config.embedding_pooling == "last" else hidden_states.mean(dim=1)
        return self.text_projection(pooled)

    def _embed_sequences(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        """(B, L, H) padded on either side -> read-out of the [EMB] vectors appended to each row."""
        batch, k = len(inputs_embeds), self.config.num_embedding_tokens
        embedding_tokens = self.embedding_tokens.to(inputs_embeds.dtype).expand(batch, -1, -1)  # (B, k, H)
        inputs_embeds = torch.cat([inputs_embeds, embedding_tokens], dim=1)  # (B, L + k, H)
        self._check_length(inputs_embeds.shape[1])
        attention_mask = torch.cat([attention_mask.long(), attention_mask.new_ones(batch, k).long()], dim=1)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)  # (B, L + k)
        bidirectional = None if self.config.text_attention == "causal" else attention_mask - 1  # 0, or -1 for padding
        hidden_states = self._run_decoder(inputs_embeds, position_ids, attention_mask, bidirectional)[:, -k:]
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self._read_out(hidden_states)
        )  # (B, k, H), (B, D)

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Embed texts. The vocabulary head is not run.

        Args:
            input_ids: (B, L), padded on either side. L may be 0: the embedding of an empty text is the read-out of
                the [EMB] vectors alone.
            attention_mask: (B, L), 1 for text; by default all of it.

        Returns:
            `pooler_output` (B, D), unnormalised; `last_hidden_state` (B, k, H), the states of the [EMB] vectors.

        Raises:
            ValueError: for an empty batch, shapes that do not fit, or more tokens than the model takes.
        """
        attention_mask = _checked_mask(input_ids, attention_mask)
        return self._embed_sequences(self.get_input_embeddings()(input_ids), attention_mask)

    @can_return_tuple
    def get_multimodal_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Embed texts that contain images.

        Args:
            input_ids: (B, L) with n placeholders for each image, or for each box if there are boxes.
            attention_mask: (B, L).
            pixel_values: (I, 3, H, W), the images in the order of their placeholders.
            boxes: (I, R, 4) xyxy in [0, 1]; then the boxes take the place of the whole images.

        Returns:
            `pooler_output` (B, D), unnormalised; `last_hidden_state` (B, k, H).

        Raises:
            ValueError: if images and placeholders do not match, and as [`get_text_features`].
        """
        attention_mask = _checked_mask(input_ids, attention_mask)
        inputs_embeds = self._embed_prompt(input_ids, pixel_values, boxes)  # (B, L, H)
        return self._embed_sequences(inputs_embeds, attention_mask)

    def _embed_prompt(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None, boxes: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, L) -> (B, L, H), visual tokens in the place of their placeholders."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return inputs_embeds
        tokens = self._visual_tokens(pixel_values, boxes)
        tokens = tokens.flatten(0, 1) if boxes is None else tokens[_is_box(boxes)].flatten(0, 1)  # (units * n, C)
        placeholders = input_ids == self.config.image_token_id  # (B, L)
        if placeholders.sum() != len(tokens):
            n = self.config.num_visual_tokens
            raise ValueError(
                f"`input_ids` holds {placeholders.sum()} image placeholders, but `pixel_values` (and `boxes`) give "
                f"{len(tokens) // n} images or boxes; expected {n} placeholders for each, {len(tokens)} in all."
            )
        visual_embeds = self.token_projection(tokens).to(inputs_embeds.dtype)  # (units * n, H)
        return inputs_embeds.masked_scatter(placeholders[..., None], visual_embeds)

    # Everything at once

    @can_return_tuple
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
        image_index: torch.LongTensor | None = None,
        box_index: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        contrastive_mask: torch.BoolTensor | None = None,
        hard_negative_mask: torch.BoolTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_contrastive_batch: bool = False,
        **kwargs,
    ) -> MMGEMOutput | BaseModelOutputWithPooling:
        """
        Four meanings, by what is given:

        1. `pixel_values` alone: image features, as [`get_image_features`].
        2. `input_ids` with placeholders (or no `pixel_values`): next-token `logits`; with `labels` the language
           modelling `loss`. This is what `generate` calls.
        3. `input_ids` without placeholders and `pixel_values`: every image against every text, `logits_per_image`,
           `logits_per_text`, `image_embeds`, `text_embeds`, as in CLIP.
        4. the same with `return_loss`: the joint loss too. The vision tower runs once over the images and the language
           model once over packed rows, each text standing there twice: alone, to be embedded, and behind the visual
           tokens of its image, to be generated.

        Args:
            input_ids: (B, L) prompts or (T, L) texts.
            pixel_values: (I, 3, H, W).
            attention_mask: like `input_ids`, 1 for tokens, 0 for padding on either side.
            boxes: (I, R, 4) xyxy in [0, 1] of the model's view; rows of zeros are padding.
            labels: like `input_ids`, token ids to be generated, -100 elsewhere. In meaning 4 the default is every
                token; a row of -100 is only embedded. An end-of-sequence token is appended to each generated text.
            return_loss: compute the joint loss.
            image_index: (T,) which image each text describes; by default text i describes image i. -1 for a text
                without an image, of which language modelling is learned (then `pixel_values` may be missing as well).
            box_index: (T,) which box of that image; -1 (the default) for the whole image.
            image_ids: (I,) identity of each image, so that copies of one image are never each other's negatives; by
                default every image is different.
            contrastive_mask: (T,) False for texts that are only generated, such as answers to a question.
            hard_negative_mask: (T,) True for texts that describe no image: candidates that every image has to tell
                from its own texts.
            num_items_in_batch: tokens to divide the caption loss by, over all processes and accumulation steps.
            return_contrastive_batch: leave the contrastive loss to the caller, who finds its ingredients, of this
                process and with gradients, in `contrastive_batch`; `loss` is the caption loss then.
            position_ids, past_key_values, inputs_embeds, kwargs: handed to the language model.

        Raises:
            ValueError: if numbers or shapes do not fit together.
        """
        if input_ids is None and inputs_embeds is None:
            if pixel_values is None:
                raise ValueError("`input_ids` and `pixel_values` are both None; expected at least one of them.")
            return self.get_image_features(pixel_values, boxes, return_dict=True)

        has_placeholders = input_ids is None or (input_ids == self.config.image_token_id).any()
        if has_placeholders or (pixel_values is None and not return_loss):
            if return_loss:
                raise ValueError(
                    "`return_loss` expects `pixel_values` and `input_ids` without image placeholders; for the loss of "
                    "a prompt give `labels`."
                )
            if inputs_embeds is None:
                inputs_embeds = self._embed_prompt(input_ids, pixel_values, boxes)  # (B, L, H)
            if labels is not None:
                kwargs["labels"], kwargs["num_items_in_batch"] = labels, num_items_in_batch
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            return MMGEMOutput(
                loss=outputs.loss,
                logits=outputs.logits,  # (B, L, vocabulary)
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )

        attention_mask = _checked_mask(input_ids, attention_mask, allow_empty=return_loss)
        if return_loss:
            return self._joint_forward(
                input_ids,
                pixel_values,
                attention_mask,
                boxes,
                labels,
                image_index,
                box_index,
                image_ids,
                contrastive_mask,
                hard_negative_mask,
                num_items_in_batch,
                return_contrastive_batch,
            )
        if labels is not None or boxes is not None:
            raise ValueError(
                f"`{'boxes' if labels is None else 'labels'}` came with images and texts that are only compared; "
                "expected image placeholders in `input_ids` to generate from, or `return_loss=True` to train. Boxes "
                "are embedded by `get_image_features`."
            )
        image_embeds = F.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)  # (I, D)
        text_embeds = F.normalize(self.get_text_features(input_ids, attention_mask).pooler_output, dim=-1)  # (T, D)
        return self._pair_output(image_embeds, text_embeds)

    def _temperature(self) -> torch.Tensor:
        """Inverse temperature, at most 100."""
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp().squeeze()

    def _pair_output(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor, **fields) -> MMGEMOutput:
        logits_per_image = self._temperature() * image_embeds @ text_embeds.T  # (I, T)
        if self.logit_bias is not None:
            logits_per_image = logits_per_image + self.logit_bias
        return MMGEMOutput(
            **fields,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )

    def _joint_forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        attention_mask: torch.Tensor,
        boxes: torch.Tensor | None,
        labels: torch.Tensor | None,
        image_index: torch.Tensor | None,
        box_index: torch.Tensor | None,
        image_ids: torch.Tensor | None,
        contrastive_mask: torch.Tensor | None,
        hard_negative_mask: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        return_contrastive_batch: bool,
    ) -> MMGEMOutput:
        """Meaning 4 of [`forward`]: one pass of each tower, both losses."""
        num_texts, device = len(input_ids), input_ids.device
        num_images = 0 if pixel_values is None else len(pixel_values)
        if image_index is None:
            if num_images != num_texts:
                raise ValueError(
                    f"`pixel_values` holds {num_images} images and `input_ids` {num_texts} texts; expected pairs, or "
                    "`image_index` to say which image each text describes."
                )
            image_index = torch.arange(num_texts, device=device)
        if box_index is None:
            box_index = torch.full((num_texts,), -1, device=device)
        if image_ids is None:
            image_ids = default_image_ids(num_images, device)
        if contrastive_mask is None:
            contrastive_mask = image_index >= 0
        if hard_negative_mask is None:
            hard_negative_mask = torch.zeros(num_texts, dtype=torch.bool, device=device)
        if labels is None:
            labels = input_ids.masked_fill(attention_mask == 0, IGNORED_LABEL)
        _check_boxes(boxes, num_images)
        if boxes is None and (box_index >= 0).any():
            raise ValueError(
                f"`box_index` is {box_index.tolist()}, but `boxes` is None; expected the boxes it points to."
            )
        if (contrastive_mask & (image_index < 0)).any():
            raise ValueError(
                "`contrastive_mask` is True for a text whose `image_index` is -1; expected an image for it."
            )

        # Vision: the tower once; whole images and boxes through the same aggregator. Without an image a blank one
        # runs, so that in a distributed run every process takes part with every parameter.
        if pixel_values is None:
            size = _pair(self.config.vision_config.image_size)
            pixel_values = torch.zeros(1, self.config.vision_config.num_channels, *size, device=device)
        grid = self._patch_grid(pixel_values)  # (I, C, rows, columns)
        image_tokens = self.pool_aggregator(grid)  # (I, n, C)
        described_tokens = image_tokens[image_index.clamp(min=0)]  # (T, n, C)
        box_tokens = None
        if boxes is not None:
            box_tokens = self.pool_aggregator(grid, boxes)  # (I, R, n, C)
            of_box = box_tokens[image_index.clamp(min=0), box_index.clamp(min=0)]  # (T, n, C)
            described_tokens = torch.where((box_index >= 0)[:, None, None], of_box, described_tokens)

        # Language: captions behind their visual tokens, and bare texts before [EMB], packed into the same rows.
        generated = (labels != IGNORED_LABEL).any(-1)  # (T,)
        has_image = image_index[generated] >= 0
        caption_ids, caption_labels, is_visual, caption_lengths = self._caption_sequences(
            input_ids[generated], attention_mask[generated], labels[generated], has_image
        )  # (N_c,), (N_c,), (N_c,), (S_c,)
        text_ids, is_read_out, text_lengths = self._text_sequences(
            input_ids[contrastive_mask], attention_mask[contrastive_mask]
        )  # (N_t,), (N_t,), (S_t,)
        visual_embeds = self.token_projection(described_tokens[generated])[has_image].flatten(0, 1)
        # All words in one lookup: the gradient of each is as large as the vocabulary.
        caption_embeds, text_embeds = self.get_input_embeddings()(torch.cat([caption_ids, text_ids])).split(
            [len(caption_ids), len(text_ids)]
        )  # (N_c, H), (N_t, H)
        caption_embeds = _put(caption_embeds, is_visual, visual_embeds)
        text_embeds = _put(text_embeds, is_read_out, self.embedding_tokens.repeat(len(text_lengths), 1))
        sequences, lengths = [caption_embeds, text_embeds], torch.cat([caption_lengths, text_lengths]).tolist()
        if not lengths:  # as above: some text always runs
            sequences, lengths = [*sequences, self.embedding_tokens], [len(self.embedding_tokens)]
        hidden_states = self._run_packed(torch.cat(sequences), lengths, len(caption_lengths))
        caption_states = hidden_states[: len(caption_embeds)]  # (N_c, H)
        text_states = hidden_states[len(caption_embeds) :][: len(text_embeds)]  # (N_t, H)

        caption_loss = self._caption_loss(caption_states, caption_labels, num_items_in_batch)
        if not (len(caption_lengths) and num_images):
            caption_loss = caption_loss + 0.0 * (hidden_states.sum() + image_tokens.sum())

        k, hidden_size = self.embedding_tokens.shape
        read_outs = text_states[is_read_out].view(len(text_lengths), k, hidden_size)
        text_features = self._read_out(read_outs).float()  # (S_t, D)
        image_features = self._embed_visual_tokens(image_tokens[:num_images]).float()  # (I, D)
        image_embeds = F.normalize(image_features, dim=-1)  # (I, D)
        text_embeds = F.normalize(text_features, dim=-1)  # (S_t, D)
        region_embeds, region_ids, row_of_box = image_embeds[:0], image_ids[:0], None
        if boxes is not None:
            region_embeds, region_ids, row_of_box = self._regions(box_tokens, boxes, image_ids)
        image_index, box_index = image_index[contrastive_mask], box_index[contrastive_mask]  # (S_t,)
        of_region = box_index >= 0
        target_index = image_index
        if row_of_box is not None:
            region_index = num_images + row_of_box[image_index, box_index.clamp(min=0)]  # (S_t,)
            target_index = torch.where(of_region, region_index, image_index)
        batch = ContrastiveBatch(
            query_embeds=text_embeds,
            target_embeds=torch.cat([image_embeds, region_embeds]),  # (I + boxes, D)
            target_index=target_index.masked_fill(hard_negative_mask[contrastive_mask], -1),
            query_ids=token_row_ids(input_ids, attention_mask)[contrastive_mask],
            target_ids=torch.cat([image_ids, region_ids]),
            query_modality=torch.where(of_region, REGION, IMAGE),
            target_modality=torch.cat([torch.full_like(image_ids, IMAGE), torch.full_like(region_ids, REGION)]),
            logit_scale=self._temperature(),
            logit_bias=None if self.logit_bias is None else self.logit_bias.squeeze(),
        )
        contrastive = None if return_contrastive_batch else ContrastiveObjective()(batch)
        return self._pair_output(
            image_embeds,
            text_embeds,
            loss=caption_loss if contrastive is None else caption_loss + contrastive,
            caption_loss=caption_loss,
            contrastive_loss=contrastive,
            contrastive_batch=batch,
            image_norm=image_features.detach().norm(dim=-1).mean(),
            text_norm=text_features.detach().norm(dim=-1).mean(),
        )

    def _regions(
        self, box_tokens: torch.Tensor, boxes: torch.Tensor, image_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(I, R, n, C) -> unit vectors (N, D) and ids (N,) of the boxes that are no padding; row in them (I, R)."""
        is_box = _is_box(boxes)  # (I, R)
        region_embeds = F.normalize(self._embed_visual_tokens(box_tokens[is_box]).float(), dim=-1)  # (N, D)
        region_ids = ids_of_regions(image_ids, boxes.shape[1])  # (I, R)
        row_of_box = is_box.flatten().cumsum(0).view_as(is_box) - 1  # (I, R)
        return region_embeds, region_ids[is_box], row_of_box

    def _caption_sequences(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, has_image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        [BOS] visual tokens, text, [EOS], without padding.

        Args:
            input_ids, attention_mask, labels: (S, L).
            has_image: (S,), False for a text that goes without visual tokens.

        Returns:
            Flat ids (N,), flat labels (N,), whether a visual token comes there (N,), lengths (S,).
        """
        if len(input_ids) == 0:
            return input_ids.flatten(), labels.flatten(), attention_mask.flatten().bool(), attention_mask.sum(-1)
        text_config = self.config.text_config
        input_ids, attention_mask, labels = _without_empty_columns(attention_mask, input_ids, attention_mask, labels)
        is_token = attention_mask.bool()  # (S, L)
        position = is_token.long().cumsum(-1) - 1  # (S, L)
        is_first = is_token & (position == 0)
        is_last = is_token & (position == position.max(-1, keepdim=True).values)
        is_bos = is_first & (input_ids == first_token_id(text_config.bos_token_id))  # the image comes after it
        eos_token_id = first_token_id(text_config.eos_token_id)
        ends = (is_last & (input_ids == eos_token_id)).any(-1, keepdim=True)  # (S, 1)
        is_generated = (is_last & (labels != IGNORED_LABEL)).any(-1, keepdim=True)
        appends_eos = ~ends & (eos_token_id >= 0)  # (S, 1)
        bos = torch.full_like(ends, max(first_token_id(text_config.bos_token_id), 0), dtype=torch.long)
        eos = torch.full_like(bos, max(eos_token_id, 0))

        visual = bos.new_zeros(len(bos), self.config.num_visual_tokens)  # (S, n), any id
        ids = torch.cat([bos, visual, input_ids, eos], dim=1)  # (S, 1 + n + L + 1)
        shows_image = has_image[:, None].expand_as(visual)
        keep = torch.cat([is_bos.any(-1, keepdim=True), shows_image, is_token & ~is_bos, appends_eos], dim=1)
        is_visual = torch.zeros_like(keep)
        is_visual[:, 1 : 1 + visual.shape[1]] = True
        # The first token of all has nothing to be predicted from.
        labels = labels.masked_fill(is_first & ~has_image[:, None], IGNORED_LABEL)
        prefix_labels = labels.new_full((len(labels), 1 + visual.shape[1]), IGNORED_LABEL)
        eos_labels = eos.masked_fill(~is_generated, IGNORED_LABEL)
        labels = torch.cat([prefix_labels, labels, eos_labels], dim=1)
        return ids[keep], labels[keep], is_visual[keep], keep.sum(-1)

    def _text_sequences(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(S, L) -> text and [EMB] without padding: flat ids (N,), whether [EMB] (N,), lengths (S,)."""
        input_ids, attention_mask = _without_empty_columns(attention_mask, input_ids, attention_mask)
        k = len(self.embedding_tokens)
        keep = F.pad(attention_mask.bool(), (0, k), value=True)  # (S, L + k)
        is_embedding = F.pad(torch.zeros_like(attention_mask).bool(), (0, k), value=True)  # (S, L + k)
        return F.pad(input_ids, (0, k))[keep], is_embedding[keep], keep.sum(-1)

    def _run_packed(self, inputs_embeds: torch.Tensor, lengths: list[int], num_causal: int) -> torch.Tensor:
        """(N, H) flat sequences, the first `num_causal` of them always causal -> (N, H) hidden states."""
        self._check_length(max(lengths))
        layout = PackedLayout(lengths, inputs_embeds.device)
        bidirectional = None
        if self.config.text_attention == "bidirectional":
            bidirectional = layout.segment_ids.masked_fill(layout.segment_ids < num_causal, -1)
        packed = layout.pack(inputs_embeds)  # (rows, row_length, H)
        hidden_states = self._run_decoder(packed, layout.position_ids, None, bidirectional)
        return layout.unpack(hidden_states)  # (N, H)

    def _caption_loss(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """(N, H) flat states and (N,) labels -> scalar; vocabulary logits only where a label is."""
        # Every sequence starts with an unlabelled token, so shifting never crosses a border.
        labelled = labels[1:] != IGNORED_LABEL
        hidden_states, labels = hidden_states[:-1][labelled], labels[1:][labelled]  # (M, H), (M,)
        chunk_size = max(1, LOGITS_AT_ONCE // self.config.text_config.vocab_size)
        if len(labels) <= chunk_size:
            total = self._cross_entropy(hidden_states, labels)
        else:
            total = self._chunked_cross_entropy(hidden_states, labels, chunk_size)
        if num_items_in_batch is None:
            num_items_in_batch = max(len(labels), 1)
        return total / num_items_in_batch

    def _cross_entropy(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(M, H) states and (M,) labels -> sum of the losses."""
        logits = self._vocabulary_logits(hidden_states)  # (M, vocabulary)
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    def _chunked_cross_entropy(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, chunk_size: int
    ) -> torch.Tensor:
        """The same, with the logits of `chunk_size` states in memory at a time."""
        head, device = self.get_output_embeddings(), hidden_states.device.type
        changes_logits = any(getattr(self.config.text_config, name, None) is not None for name in LOGIT_CHANGES)
        is_matrix = type(head) is nn.Linear and head.bias is None and head.weight.ndim == 2 and not changes_logits
        if is_matrix and head.weight.dtype == torch.float32 and not torch.is_autocast_enabled(device):
            # Takes the gradient along with the loss. In half precision it would round the loss and be slower.
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
            return F.linear_cross_entropy(hidden_states, head.weight, labels, reduction="sum", options=options)
        chunks = zip(hidden_states.split(chunk_size), labels.split(chunk_size), strict=True)
        losses = [checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()

    def _vocabulary_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The language model's head on single states, with the scalings some families put behind it."""
        text_config = self.config.text_config
        logits = self.get_output_embeddings()(hidden_states)
        if getattr(text_config, "logits_scaling", None) is not None:  # Granite
            logits = logits / text_config.logits_scaling
        if getattr(text_config, "logit_scale", None) is not None:  # Cohere
            logits = logits * text_config.logit_scale
        if getattr(text_config, "final_logit_softcapping", None) is not None:  # Gemma 2
            cap = text_config.final_logit_softcapping
            logits = torch.tanh(logits / cap) * cap
        return logits

    # Generation and saving

    def _expand_inputs_for_generation(self, expand_size: int = 1, is_encoder_decoder=False, input_ids=None, **kwargs):
        pixel_values = kwargs.get("pixel_values")
        if expand_size > 1 and pixel_values is not None and len(pixel_values) != len(input_ids):
            raise ValueError(
                f"`pixel_values` holds {len(pixel_values)} images for {len(input_ids)} prompts; beams and several "
                "returned sequences expect one image per prompt."
            )
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        # The Hub folder carries the pipeline because it is imported here: files are collected by their imports.
        from .pipeline_mmgem import MMGEMImageToTextPipeline  # noqa: F401

        return super().save_pretrained(*args, **kwargs)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def first_token_id(token_id: int | list[int] | None) -> int:
    """Some language models list several end tokens; some have none, and -1 equals no token."""
    if isinstance(token_id, list | tuple):
        return token_id[0]
    return -1 if token_id is None else token_id


def _put(embeds: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(N, H) embeddings, with `values` (M, H) in the M rows where `places` (N,) is True."""
    return embeds.masked_scatter(places[:, None], values.to(embeds.dtype))


def _without_empty_columns(attention_mask: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Drops the columns of (S, L) tensors in which no row has a token: longer rows may have been left out."""
    used = attention_mask.bool().any(0)  # (L,)
    return [tensor[:, used] for tensor in tensors]


def _is_box(boxes: torch.Tensor) -> torch.Tensor:
    """(B, R, 4) -> (B, R), False for the rows of zeros that pad a batch."""
    return (boxes != 0).any(-1)


def _check_boxes(boxes: torch.Tensor | None, num_images: int):
    if boxes is not None and (boxes.ndim != 3 or boxes.shape[0] != num_images or boxes.shape[2] != 4):
        raise ValueError(f"`boxes` has shape {tuple(boxes.shape)}; expected ({num_images}, R, 4).")


def _checked_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, allow_empty: bool = False
) -> torch.Tensor:
    if input_ids.ndim != 2 or (len(input_ids) == 0 and not allow_empty):
        raise ValueError(f"`input_ids` has shape {tuple(input_ids.shape)}; expected (B, L) with B at least 1.")
    if attention_mask is None:
        return torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}; expected that of `input_ids`, "
            f"{tuple(input_ids.shape)}."
        )
    return attention_mask


MMGEMModel.register_for_auto_class("AutoModel")

__all__ = ["MMGEMModel", "MMGEMOutput"]
