"""The joint step: every loss of a batch from one pass of the vision tower and one, packed, of the language model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .contrastive import ContrastiveObjective
from .contrastive_batch import (
    DOCUMENT,
    IMAGE,
    REGION,
    ContrastiveBatch,
    gather_sizes,
    ids_of_regions,
    ids_of_rows,
)
from .input_checks import is_box
from .packing import PackedLayout
from .patch_grid import blank_image
from .text_rows import IGNORED_LABEL, TextRows
from .text_sequences import TextSequences, caption_sequences, embedded_sequences, recalled_sequences

LOGITS_AT_ONCE = 2**24  # vocabulary logits in memory; a caption loss with more goes chunk by chunk
LOGIT_CHANGES = ("logits_scaling", "logit_scale", "final_logit_softcapping")  # of Granite, Cohere, Gemma 2


class JointStep:
    """Meaning 4 of `MMGEMModel.forward`, as a part of that class, which brings along what is named here.

    `torch.compile` leaves out what arranges the rows of a batch, and compiles what it calls: the towers and the heads.
    """

    config: Any
    embedding_tokens: torch.Tensor  # (k, H)
    logit_bias: torch.Tensor | None
    _patch_grid: Any
    _pool: Any
    token_projection: Any
    vlm: Any
    _vlm_image_tokens: Any
    _refuse_to_show_images: Any
    get_input_embeddings: Any
    get_output_embeddings: Any
    _embed_visual_tokens: Any
    _read_out: Any
    _run_decoder: Any
    _check_length: Any
    _check_reading: Any
    inverse_temperature: Any
    _pair_output: Any

    @torch.compiler.disable(recursive=False)
    def _joint_forward(
        self,
        rows: TextRows,
        pixel_values: torch.Tensor | None,
        boxes: torch.Tensor | None,
        image_ids: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
        return_contrastive_batch: bool,
        spatial_shapes: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
    ):
        num_images, device = len(image_ids), rows.input_ids.device
        # Vision: the tower once; whole images and boxes through the same aggregator. Without an image a blank one
        # runs, so that in a distributed run every process takes part with every parameter.
        if pixel_values is None and patch_features is None:
            pixel_values = blank_image(self.config.grid, device)
        if patch_features is None:
            grid = self._patch_grid(pixel_values, spatial_shapes)  # (I, C, rows, columns)
        else:
            grid = patch_features.to(self.embedding_tokens.dtype)
        image_tokens = self._pool(grid, pixel_values, None, spatial_shapes)  # (I, n, C)
        box_tokens = None if boxes is None else self._pool(grid, pixel_values, boxes, spatial_shapes)  # (I, R, n, C)

        row_of_text = rows.is_embedded.cumsum(0) - 1  # (T,), row in `read_outs`
        if rows.text_states is None:
            read_outs, caption_loss, labels = self._read_and_write(
                rows, row_of_text, image_tokens, box_tokens, pixel_values, num_items_in_batch
            )
        else:
            read_outs, labels = self._given_read_outs(rows), rows.labels.new_empty(0)  # (S_t, k, H), (0,)
            caption_loss = 0.0 * image_tokens.sum()

        text_features = self._read_out(read_outs).float()  # (S_t, D) or (S_t, k, D)
        image_features = self._embed_visual_tokens(image_tokens[:num_images]).float()  # (I, D) or (I, k, D)
        image_embeds, text_embeds = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
        region_embeds, region_ids, row_of_box = self._regions(image_embeds, box_tokens, boxes, image_ids)

        query_embeds = text_embeds[row_of_text[rows.contrastive_mask]]  # (Q, ...)
        document_embeds = text_embeds[row_of_text[rows.is_document]]  # (N, ...)
        target_index, query_modality = _targets(rows, num_images, len(region_embeds), row_of_box)
        row_ids = ids_of_rows(rows.input_ids, rows.attention_mask, rows.fused_index, image_ids)  # (T,)
        modalities = (IMAGE, len(image_embeds)), (REGION, len(region_embeds)), (DOCUMENT, len(document_embeds))
        batch = ContrastiveBatch(
            query_embeds=query_embeds,
            target_embeds=torch.cat([image_embeds, region_embeds, document_embeds]),  # (P, ...)
            target_index=target_index,
            query_ids=row_ids[rows.contrastive_mask],
            target_ids=torch.cat([image_ids, region_ids, row_ids[rows.is_document]]),
            query_modality=query_modality,
            target_modality=torch.cat([image_ids.new_full((count,), modality) for modality, count in modalities]),
            logit_scale=self.inverse_temperature(),
            logit_bias=None if self.logit_bias is None else self.logit_bias.squeeze(),
        )
        contrastive, loss = None, caption_loss
        if not return_contrastive_batch:
            contrastive = ContrastiveObjective()(batch)
            loss = self._joint_loss(caption_loss, contrastive, labels, rows.labels, num_items_in_batch)
        return self._pair_output(
            image_embeds,
            query_embeds,
            loss=loss,
            caption_loss=caption_loss,
            contrastive_loss=contrastive,
            contrastive_batch=batch,
            visual_tokens=image_tokens[:num_images] if return_contrastive_batch else None,
            image_norm=image_features.detach().norm(dim=-1).mean(),
            text_norm=text_features.detach().norm(dim=-1).mean(),
        )

    def _read_and_write(
        self,
        rows: TextRows,
        row_of_text: torch.Tensor,
        image_tokens: torch.Tensor,
        box_tokens: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the language model: captions after their visual tokens, and what is embedded before [EMB], packed into
        the same rows.

        Args:
            rows: The texts.
            row_of_text: (T,) long, the row that each text that is embedded has in what was read out.
            image_tokens: (I, n, C).
            box_tokens: (I, R, n, C), or None.
            pixel_values: For the connector of a VLM.
            num_items_in_batch: As for [`MMGEMModel.forward`].

        Returns:
            (S_t, k, H) states of the [EMB] vectors, the caption loss, and its (N,) labels.
        """
        embedding_tokens, n = self.embedding_tokens, self.config.num_visual_tokens  # (k, H)
        k = len(embedding_tokens)
        vlm_tokens = None
        if self.vlm is not None and self.config.vlm_attention == "unknown":
            if self._shows_images(rows):
                self._refuse_to_show_images()
            vlm_tokens = embedding_tokens.new_empty(len(image_tokens), 0, embedding_tokens.shape[1])  # (I, 0, H)
        elif self.vlm is not None:
            vlm_tokens = self._vlm_image_tokens(pixel_values)  # (I, p, H)
        image_length = n if vlm_tokens is None else vlm_tokens.shape[1]
        captions = caption_sequences(rows, image_length, n, self.config)
        texts = embedded_sequences(rows, image_length, k, self.config)
        recalled = recalled_sequences(rows, k, self.config)
        # All words in one lookup: the gradient of each is as large as the vocabulary.
        parts, embeddings = (captions, texts, recalled), self.get_input_embeddings()
        if hasattr(embeddings, "neftune_noise_alpha"):
            raise ValueError(
                f"`neftune_noise_alpha` is {embeddings.neftune_noise_alpha}, but its noise depends on the length of a "
                "text, and a joint step packs many; expected None."
            )
        caption_embeds, text_embeds, recalled_embeds = embeddings(torch.cat([part.token_ids for part in parts])).split(
            [len(part.token_ids) for part in parts]
        )  # (N_c, H), (N_t, H), (N_m, H)
        is_described = rows.is_generated & ~rows.is_recalled & (rows.image_index >= 0)  # (T,)
        described = self._described_tokens(rows, is_described, image_tokens, box_tokens)  # (., n, C)
        fused_index = rows.fused_index[rows.is_embedded]  # (S_t, F)
        fused_index = fused_index[fused_index >= 0]  # (.), text after text
        if vlm_tokens is None:
            fused = image_tokens[fused_index]  # (., n, C)
            described_embeds, fused_embeds = self.token_projection(torch.cat([described, fused])).split(
                [len(described), len(fused)]
            )
            caption_embeds = _put(caption_embeds, captions.is_prefix, described_embeds.flatten(0, 1))
        else:  # images by the connector of the VLM, boxes by our own
            is_box_row, of_box = rows.box_index[is_described] >= 0, self._of_box(rows, captions)  # (.), (N_c,)
            shown = vlm_tokens[rows.image_index[is_described][~is_box_row]]  # (., p, H)
            caption_embeds = _put(caption_embeds, captions.is_prefix & ~of_box, shown.flatten(0, 1))
            shown = self.token_projection(described[is_box_row])  # (., n, H)
            caption_embeds = _put(caption_embeds, captions.is_prefix & of_box, shown.flatten(0, 1))
            fused_embeds = vlm_tokens[fused_index]  # (., p, H)
        text_embeds = _put(text_embeds, texts.is_prefix, fused_embeds.flatten(0, 1))
        text_embeds = _put(text_embeds, texts.is_suffix, embedding_tokens.repeat(len(texts.lengths), 1))
        lengths, blocks = torch.cat([captions.lengths, texts.lengths]), self._blocks(rows, captions, texts)
        hidden_states = self._run_packed(torch.cat([caption_embeds, text_embeds]), lengths, blocks)
        caption_states, text_states = hidden_states.split(
            [len(caption_embeds), len(text_embeds)]
        )  # (N_c, H), (N_t, H)
        read_outs = text_states[texts.is_suffix].view(len(texts.lengths), *embedding_tokens.shape)  # (S_t, k, H)

        # A text that is written from a memory stands after states that were just read out, and sees no image.
        labels, unused = captions.labels, hidden_states.sum() + image_tokens.sum()
        if rows.reads_memory:
            memory = read_outs[row_of_text[rows.memory_row[rows.is_recalled]]]  # (S_m, k, H)
            recalled_embeds = _put(recalled_embeds, recalled.is_prefix, memory.flatten(0, 1))
            blocks = torch.full_like(recalled.token_ids, -1)
            recalled_states = self._run_packed(recalled_embeds, recalled.lengths, blocks)  # (N_m, H)
            caption_states, labels = torch.cat([caption_states, recalled_states]), torch.cat([labels, recalled.labels])
        caption_loss = self._caption_loss(caption_states, labels, num_items_in_batch) + 0.0 * unused
        return read_outs, caption_loss, labels

    def _given_read_outs(self, rows: TextRows) -> torch.Tensor:
        """(S_t, k, H) the `text_states` of the texts that are embedded, in place of the language model."""
        assert rows.text_states is not None
        if rows.is_generated.any() or (rows.fused_index[rows.is_embedded] >= 0).any():
            raise ValueError(
                "`text_states` came with texts that are generated, or embedded after images; expected `labels` of "
                "-100, and texts that are embedded alone."
            )
        shape = tuple(rows.text_states.shape[1:])
        if shape != tuple(self.embedding_tokens.shape):
            raise ValueError(
                f"`text_states` has shape {tuple(rows.text_states.shape)}; expected (T, k, H) with (k, H) "
                f"{tuple(self.embedding_tokens.shape)}, those of the [EMB] vectors."
            )
        return rows.text_states[rows.is_embedded].to(self.embedding_tokens.dtype)

    @torch.compiler.disable(recursive=False)
    def _regions(
        self,
        image_embeds: torch.Tensor,
        box_tokens: torch.Tensor | None,
        boxes: torch.Tensor | None,
        image_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(I, R, n, C) -> unit vectors (N, ...) and ids (N,) of the boxes that are no padding; row in them (I, R)."""
        if box_tokens is None or boxes is None:
            return image_embeds[:0], image_ids[:0], None
        real = is_box(boxes)  # (I, R)
        region_embeds = F.normalize(self._embed_visual_tokens(box_tokens[real]).float(), dim=-1)  # (N, ...)
        region_ids = ids_of_regions(image_ids, boxes.shape[1])  # (I, R)
        row_of_box = real.flatten().cumsum(0).view_as(real) - 1  # (I, R)
        return region_embeds, region_ids[real], row_of_box

    @staticmethod
    @torch.compiler.disable
    def _described_tokens(
        rows: TextRows, chosen: torch.Tensor, image_tokens: torch.Tensor, box_tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """(S, n, C) visual tokens of the image or box that each of the texts `chosen`, (T,) bool, describes."""
        image_index, box_index = rows.image_index[chosen], rows.box_index[chosen]  # (S,)
        tokens = image_tokens[image_index]  # (S, n, C)
        if box_tokens is None:
            return tokens
        return torch.where((box_index >= 0)[:, None, None], box_tokens[image_index, box_index.clamp(min=0)], tokens)

    @staticmethod
    def _shows_images(rows: TextRows) -> bool:
        """Whether the language model sees a whole image before any text."""
        is_shown = rows.is_generated & ~rows.is_recalled & (rows.image_index >= 0) & (rows.box_index < 0)  # (T,)
        return bool(is_shown.any() | (rows.fused_index[rows.is_embedded] >= 0).any())

    @staticmethod
    def _of_box(rows: TextRows, captions: TextSequences) -> torch.Tensor:
        """(N_c,) bool, the tokens of texts that describe a box."""
        return (rows.box_index[rows.is_generated & ~rows.is_recalled] >= 0)[captions.sequence]

    @torch.compiler.disable
    def _blocks(self, rows: TextRows, captions: TextSequences, texts: TextSequences) -> torch.Tensor:
        """(N_c + N_t,) long, for `_run_packed`: how texts are read, and how a VLM reads its images.

        [EMB] vectors are causal among themselves, so that the first of them are what fewer would be.
        """
        blocks, first_unit = [], len(captions.lengths) + len(texts.lengths)
        for part, first_sequence in ((captions, 0), (texts, len(captions.lengths))):
            sequence, block = first_sequence + part.sequence, torch.full_like(part.token_ids, -1)
            seen = part.is_prefix & ~self._of_box(rows, captions) if part is captions else part.is_prefix  # (N,)
            if self.config.vlm_attention == "image":
                block = torch.where(seen, first_unit + part.unit, block)
            elif self.config.vlm_attention == "prompt":
                sees = torch.zeros_like(part.lengths).index_add(0, part.sequence, seen.long()) > 0  # (S,)
                block = torch.where(sees[part.sequence] & part.is_prompt, sequence, block)
            if self.config.text_attention == "bidirectional" and part is texts:
                block = sequence.masked_fill(part.is_suffix, -1)
            blocks.append(block)
            first_unit = first_unit + len(part.token_ids)  # more than there are units
        return torch.cat(blocks)

    @torch.compiler.disable(recursive=False)
    def _run_packed(self, inputs_embeds: torch.Tensor, lengths: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Run the language model over sequences of many lengths, without padding where it can.

        Args:
            inputs_embeds: (N, H), sequence after sequence.
            lengths: (S,); without any sequence the [EMB] vectors run, so that every process takes part.
            blocks: (N,) long; tokens of a sequence with the same number see each other both ways, those with -1 only
                what is before them.

        Returns:
            (N, H) hidden states.
        """
        size = len(inputs_embeds)
        if not size:
            # Behind the empty rest, which other parameters have a part in.
            inputs_embeds = torch.cat([inputs_embeds, self.embedding_tokens.to(inputs_embeds.dtype)])
            lengths = lengths.new_tensor([len(inputs_embeds)])
            blocks = blocks.new_full((len(inputs_embeds),), -1)
        self._check_length(int(lengths.max()))
        self._check_reading()
        is_packed = self.config.sequence_packing != "none"
        layout = PackedLayout(lengths.tolist(), inputs_embeds.device, one_per_row=not is_packed)
        packed_blocks = None
        if self.config.text_attention == "bidirectional" or self.config.vlm_attention in ("image", "prompt"):
            packed_blocks = layout.pack(blocks + 1) - 1  # (rows, row_length)
        packed = layout.pack(inputs_embeds)  # (rows, row_length, H)
        position_ids = layout.position_ids if is_packed else None
        hidden_states = layout.unpack(self._run_decoder(packed, position_ids, packed_blocks))  # (N, H)
        return hidden_states if size else hidden_states[:0] + 0.0 * hidden_states.sum()

    @torch.compiler.disable(recursive=False)
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
            num_items_in_batch = len(labels)
        # Nothing may be written in any process: then the loss is 0, whatever it is divided by.
        return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)

    @staticmethod
    @torch.compiler.disable
    def _joint_loss(
        caption_loss: torch.Tensor,
        contrastive_loss: torch.Tensor,
        labels: torch.Tensor,
        labels_of_batch: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """The sum of both; where transformers' Trainer says how many tokens an optimizer step has, the share of them.

        It adds up the losses of all processes and accumulation steps, so that the weight of the contrastive loss in
        each is that of its tokens. It counts neither the first token of a text nor the end token: both are made up
        for, and the shares of a step are parts of 1.
        """
        if num_items_in_batch is None or not num_items_in_batch:
            return caption_loss + contrastive_loss
        written = int((labels[1:] != IGNORED_LABEL).sum())
        counted = int((labels_of_batch[:, 1:] != IGNORED_LABEL).sum())
        all_written, all_counted = (sum(gather_sizes(size, labels.device)) for size in (written, counted))
        scale = all_counted / max(1, all_written)
        return scale * (caption_loss + contrastive_loss * written / num_items_in_batch)

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
        is_plain = self.vlm is None and not changes_logits
        is_matrix = is_plain and type(head) is nn.Linear and head.bias is None and head.weight.ndim == 2
        if is_matrix and head.weight.dtype == torch.float32 and not torch.is_autocast_enabled(device):
            # Takes the gradient along with the loss. In half precision it would round the loss and be slower.
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size, chunking_method=None)
            return F.linear_cross_entropy(hidden_states, head.weight, labels, reduction="sum", options=options)
        chunks = zip(hidden_states.split(chunk_size), labels.split(chunk_size), strict=True)
        losses = [checkpoint(self._cross_entropy, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()

    def _vocabulary_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The language model's head on single states, with the scalings that some families put after it."""
        if self.vlm is not None:
            return self.vlm.head(self, hidden_states)
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


@torch.compiler.disable
def _put(embeds: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(N, H) embeddings, with `values` (M, H) in the M rows where `places` (N,) is True."""
    return embeds.masked_scatter(places[:, None], values.to(embeds.dtype))


@torch.compiler.disable
def _targets(
    rows: TextRows, num_images: int, num_regions: int, row_of_box: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the target of each query stands among images, regions and documents, in this order, and which it is of
    them.

    Returns:
        (Q,) long, -1 for hard negatives, and (Q,) long, a modality.
    """
    queries = rows.contrastive_mask
    index, box_index, target_row = rows.image_index[queries], rows.box_index[queries], rows.target_row[queries]  # (Q,)
    modality = torch.where(box_index >= 0, REGION, IMAGE)
    if row_of_box is not None:
        region_index = num_images + row_of_box[index.clamp(min=0), box_index.clamp(min=0)]  # (Q,)
        index = torch.where(modality == REGION, region_index, index)
    row_of_document = num_images + num_regions + rows.is_document.cumsum(0) - 1  # (T,)
    has_row = target_row >= 0
    index = torch.where(has_row, row_of_document[target_row], index)
    modality = modality.masked_fill(has_row, DOCUMENT)
    return index.masked_fill(rows.hard_negative_mask[queries], -1), modality
