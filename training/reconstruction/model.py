"""The model with its losses of reconstruction: masked tokens and masked patches, from one forward call."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.input_checks import check_boxes, check_ids, check_pixels, checked_mask
from mmgem.modeling_mmgem import MMGEMModel
from mmgem.patch_grid import blank_image
from mmgem.text_rows import IGNORED_LABEL, TextRows
from mmgem.text_sequences import lay_out
from mmgem.training.reconstruction.head import ReconstructionHead, normalized_patches
from mmgem.training.reconstruction.masking import maskable_tokens


@dataclass
class ReconstructionOutput(ModelOutput):
    """The output of `MMGEMForReconstruction.forward` for masked inputs.

    Args:
        text_loss: Scalar, the cross-entropy of the masked tokens.
        patch_loss: Scalar, the squared error of the pixels of the masked patches.
    """

    text_loss: torch.FloatTensor | None = None
    patch_loss: torch.FloatTensor | None = None


class MMGEMForReconstruction(MMGEMModel):
    """An [`MMGEMModel`] that also learns by putting back masked inputs (MoCa, https://arxiv.org/abs/2506.23115), so
    that a language model that was trained causally learns to attend both ways.

    [BOS], visual tokens, text: every token sees all others. Some tokens of the text are replaced by one learned
    vector, and the vocabulary head predicts them, each from the state before it, as while generating (masked next
    token prediction: LLM2Vec, https://arxiv.org/abs/2404.05961). Some patches of the image are replaced, in pixels, by
    a learned one, and predicted from the states of the visual tokens, with the pixels of each normalized (masked
    autoencoders, https://arxiv.org/abs/2111.06377).

    It embeds and generates as its model does. The parts that read out embeddings play no role in reconstruction.

    Raises:
        ValueError: If `text_attention` is not `"bidirectional"`, or the model is calibrated.
    """

    _auto_class = None  # its code does not travel; the released model is an `MMGEMModel`

    def __init__(self, config: MMGEMConfig):
        super().__init__(config)
        self._add_head()

    @classmethod
    def from_model(cls, model: MMGEMModel) -> "MMGEMForReconstruction":
        """Make one of the modules of `model`, which are shared, and a fresh head."""
        reconstructing = _sharing(model, cls)
        reconstructing._add_head()
        return reconstructing

    def released(self) -> MMGEMModel:
        """Return the same modules as a plain `MMGEMModel`, without the head."""
        model = _sharing(self, MMGEMModel)
        del model.reconstruction_head
        return model

    def _add_head(self):
        if self.config.text_attention != "bidirectional":
            raise ValueError(
                f"`text_attention` is {self.config.text_attention!r}; expected 'bidirectional', since reconstruction "
                "puts tokens back from both sides."
            )
        if self.calibrator is not None:
            raise ValueError(
                f"`calibrated_modalities` is {self.config.calibrated_modalities}, for embeddings that reconstruction "
                "changes; expected a model that is calibrated afterwards."
            )
        head = ReconstructionHead(self.config).to(self.device, self.dtype)
        for module in head.modules():
            self._init_weights(module)
        self.reconstruction_head = head.train(self.training)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, ReconstructionHead):
            init.normal_(module.mask_embedding, std=0.02)
            init.zeros_(module.mask_patch)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        boxes: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        text_mask: torch.BoolTensor | None = None,
        patch_mask: torch.BoolTensor | None = None,
        image_index: torch.LongTensor | None = None,
        box_index: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
        **kwargs,
    ):
        """Compute the losses of reconstruction with `text_mask`; without, do as [`MMGEMModel.forward`].

        Args:
            input_ids: (T, L) long.
            attention_mask: (T, L), padded on either side.
            pixel_values: (I, 3, H, W), or None, if all texts are without an image.
            boxes: (I, R, 4) xyxy in [0, 1] of the model's view.
            position_ids: Only without `text_mask`, see [`MMGEMModel.forward`].
            text_mask: (T, L) bool, the tokens to put back.
            patch_mask: (I, H / patch height, W / patch width) bool, the patches to put back.
            image_index: (T,) long, the image that stands before each text, -1 for none. An image that stands before
                none is put back by itself.
            box_index: (T,) long, the box of the image that stands there instead; -1 (the default) for the whole image.
            num_items_in_batch: (2,) long, masked tokens and masked patches to divide the losses by, over all processes
                and accumulation steps; by default those of this batch.

        Returns:
            [`ReconstructionOutput`].

        Raises:
            ValueError: If shapes or indices do not fit together, a token is not in the vocabulary or a pixel not
                finite, or a token is masked that is padding or that nothing stands before.
        """
        images = {"pixel_values": pixel_values, "boxes": boxes, "image_index": image_index, "box_index": box_index}
        if text_mask is None:
            others = {"attention_mask": attention_mask, "position_ids": position_ids, "return_dict": True}
            return super().forward(input_ids, **images, **others, num_items_in_batch=num_items_in_batch, **kwargs)
        if input_ids is None or text_mask.shape != input_ids.shape or image_index is None:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(
                f"`text_mask` has shape {tuple(text_mask.shape)}, `input_ids` {shape}, and `image_index` is "
                f"{image_index}; expected the same shape, and which image stands before each text."
            )
        if pixel_values is None:  # a blank one, so that every process of a run takes part with every parameter
            pixel_values = blank_image(self.config.grid, input_ids.device)
        check_pixels(pixel_values)
        check_ids(input_ids, self.get_input_embeddings().num_embeddings, self.config.image_token_id)
        attention_mask = checked_mask(input_ids, attention_mask, allow_empty=True)
        if box_index is None:
            box_index = torch.full_like(image_index, -1)
        rows = self._rows(len(pixel_values), input_ids, attention_mask, text_mask, image_index, box_index, boxes)
        return self._reconstruct(rows, pixel_values, patch_mask, boxes, num_items_in_batch)

    def _rows(
        self,
        num_images: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        text_mask: torch.Tensor,
        image_index: torch.Tensor,
        box_index: torch.Tensor,
        boxes: torch.Tensor | None,
    ) -> TextRows:
        """The texts, but for those without token and image, and an empty one for each image that none shows whole."""
        check_boxes(boxes, num_images)
        image_number = torch.arange(num_images, device=image_index.device)
        bare = image_number[~torch.isin(image_number, image_index[box_index < 0])]  # (A,)
        is_used = attention_mask.bool().any(-1) | (image_index >= 0)  # (T,)
        input_ids, attention_mask, text_mask, box_index = (
            torch.cat([part[is_used], part.new_full((len(bare), *part.shape[1:]), fill)])
            for part, fill in ((input_ids, 0), (attention_mask, 0), (text_mask, False), (box_index, -1))
        )  # (S, L), (S, L), (S, L), (S,)
        image_index = torch.cat([image_index[is_used], bare])  # (S,)
        if (text_mask & ~maskable_tokens(input_ids, attention_mask, image_index, self.config.text_config)).any():
            raise ValueError(
                "`text_mask` is True for padding, or for a token before which nothing stands; expected False there."
            )
        columns = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": input_ids.masked_fill(~text_mask, IGNORED_LABEL),
            "image_index": image_index,
            "box_index": box_index,
            "contrastive_mask": torch.zeros_like(image_index, dtype=torch.bool),
        }
        return TextRows.from_columns(columns, num_images, boxes)

    def _reconstruct(
        self,
        rows: TextRows,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None,
        boxes: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | None,
    ) -> ReconstructionOutput:
        patches = self._patches(pixel_values)  # (I, rows, columns, channels, patch height, patch width)
        if patch_mask is None:
            patch_mask = torch.zeros(patches.shape[:3], dtype=torch.bool, device=patches.device)
        if patch_mask.shape != patches.shape[:3]:
            raise ValueError(
                f"`patch_mask` has shape {tuple(patch_mask.shape)}; expected {tuple(patches.shape[:3])}, images and "
                "their patches."
            )
        grid = self._patch_grid(self._masked(pixel_values, patch_mask))  # (I, C, rows, columns)
        image_tokens = self.pool_aggregator(grid)  # (I, n, C)
        box_tokens = None if boxes is None else self._pool(grid, pixel_values, boxes)  # (I, R, n, C)

        has_image = rows.image_index >= 0  # (S,)
        n, none = self.config.num_visual_tokens, has_image[:, None][:, :0]  # (S, 0)
        length = torch.full_like(rows.image_index, n)  # (S,)
        texts = rows.input_ids, rows.attention_mask, rows.labels
        sequences = lay_out(*texts, has_image[:, None], length, none, none.long(), self.config)
        shown = self.token_projection(self._described_tokens(rows, has_image, image_tokens, box_tokens))  # (., n, H)
        embeds = self.get_input_embeddings()(sequences.token_ids)  # (N, H)
        mask_embedding = self.reconstruction_head.mask_embedding.to(embeds.dtype)  # (H,)
        embeds = torch.where((sequences.labels == IGNORED_LABEL)[:, None], embeds, mask_embedding)
        embeds = embeds.masked_scatter(sequences.is_prefix[:, None], shown.flatten(0, 1).to(embeds.dtype))
        states = self._run_packed(embeds, sequences.lengths, sequences.sequence)  # (N, H)

        num_tokens, num_patches = (
            (None, patch_mask.sum().clamp(min=1)) if num_items_in_batch is None else num_items_in_batch
        )
        text_loss = self._caption_loss(states, sequences.labels, num_tokens)

        # Every image once, from the first text that it stands before without a box.
        shows = rows.image_index == torch.arange(len(patches), device=has_image.device)[:, None]  # (I, S)
        first_row = (shows & (rows.box_index < 0)).long().argmax(-1)  # (I,)
        visual_states = states[sequences.is_prefix].unflatten(0, (-1, n))  # (., n, H)
        visual_states = visual_states[has_image.cumsum(0)[first_row] - 1]  # (I, n, H)
        predicted = self.reconstruction_head(visual_states, patch_mask).float()  # (M, p)
        error = predicted - normalized_patches(patches[patch_mask].flatten(1).float())
        patch_loss = error.square().mean(-1).sum() / num_patches
        return ReconstructionOutput(text_loss=text_loss, patch_loss=patch_loss)

    def _patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(I, channels, H, W) -> (I, rows, columns, channels, patch height, patch width)"""
        height, width = self.config.grid.stride
        patches = pixel_values.unfold(2, height, height).unfold(3, width, width)
        return patches.permute(0, 2, 3, 1, 4, 5)

    def _masked(self, pixel_values: torch.Tensor, patch_mask: torch.Tensor) -> torch.Tensor:
        """(I, channels, H, W) images with the learned patch where `patch_mask`, (I, rows, columns), is True."""
        height, width = self.config.grid.stride
        is_masked = patch_mask.repeat_interleave(height, 1).repeat_interleave(width, 2)[:, None]  # (I, 1, H, W)
        filling = self.reconstruction_head.mask_patch.to(pixel_values.dtype).repeat(1, *patch_mask.shape[1:])
        return torch.where(is_masked, filling, pixel_values)


def _sharing(model: MMGEMModel, model_class: type[MMGEMModel]) -> MMGEMModel:
    """A model of another class with the same parameters and modules; further ones are its own."""
    shared = model_class.__new__(model_class)
    own = {name: dict(model.__dict__[name]) for name in ("_modules", "_parameters", "_buffers")}
    shared.__dict__ = {**model.__dict__, **own}
    return shared
