"""
GradCache: contrastive batches larger than memory, https://arxiv.org/abs/2101.06983.

1. Every chunk is embedded without gradients. 2. The contrastive loss of all embeddings, of all processes, gives the
gradient of each embedding. 3. Every chunk runs again, with gradients, and its embeddings are pulled along theirs. So
the graph of one chunk is all that memory has to hold, and the gradient is that of the whole batch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mmgem.contrastive_batch import ContrastiveBatch, default_image_ids, gather_sizes
from mmgem.text_rows import IGNORED_LABEL

PER_IMAGE = ("pixel_values", "boxes", "image_ids")
PER_TEXT = (
    "input_ids",
    "attention_mask",
    "labels",
    "image_index",
    "box_index",
    "contrastive_mask",
    "hard_negative_mask",
    "fused_index",
    "target_row",
    "memory_row",
)


def split_batch(inputs: Mapping[str, Any], chunk_size: int) -> list[dict[str, Any]]:
    """
    Divide a batch of the joint loss into chunks of about `chunk_size` images, each with the texts about its images;
    texts without an image are dealt out evenly. Images that a text joins, as one that it goes with and one that it is
    to find, stay together, so that a chunk may be larger. Every process gets as many chunks as the one with the most
    images.

    Args:
        inputs: as `MMGEMCollator` gives them.
        chunk_size: images, at least 1.

    Returns:
        The chunks; in each, images and texts that others point to count within the chunk.

    Raises:
        ValueError: if a text points to one about an image that no text joins with its own.
    """
    image_index, device = inputs["image_index"], inputs["image_index"].device
    num_images, num_texts = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0, len(image_index)
    num_chunks = max(gather_sizes(-(-max(num_images, 1) // chunk_size), device))
    if "image_ids" not in inputs and num_images:
        inputs = {**inputs, "image_ids": default_image_ids(num_images, device)}
    images = _split_images(inputs, num_images, num_chunks)
    sizes = torch.tensor([len(part) for part in images], device=device)
    chunk_of_image = torch.repeat_interleave(torch.arange(num_chunks, device=device), sizes)  # (I,)
    chunk_of_text = torch.arange(num_texts, device=device) * num_chunks // max(num_texts, 1)  # (T,)
    image_of_text = _image_of_text(inputs)  # (T,)
    has_image = image_of_text >= 0
    chunk_of_text[has_image] = chunk_of_image[image_of_text[has_image]]
    number_in_chunk = torch.empty_like(chunk_of_text)  # (T,)
    for number in range(num_chunks):
        texts = (chunk_of_text == number).nonzero()[:, 0]  # (T_c,)
        number_in_chunk[texts] = torch.arange(len(texts), device=device)

    chunks = []
    for number, part in enumerate(images):
        texts = (chunk_of_text == number).nonzero()[:, 0]  # (T_c,)
        chunk = {name: value for name, value in inputs.items() if name not in PER_IMAGE + PER_TEXT}
        chunk |= {name: inputs[name][texts] for name in PER_TEXT if name in inputs}
        for name in {"target_row", "memory_row"} & chunk.keys():
            rows = chunk[name]
            if (chunk_of_text[rows[rows >= 0]] != number).any():
                raise ValueError(f"`{name}` points to a text about another image; expected one about the same image.")
            chunk[name] = torch.where(rows >= 0, number_in_chunk[rows], -1)
        if len(part):
            first, end = part.start, part.stop
            chunk |= {name: inputs[name][first:end] for name in PER_IMAGE if name in inputs}  # views, not copies
            for name in {"image_index", "fused_index"} & chunk.keys():
                chunk[name] = torch.where(chunk[name] >= 0, chunk[name] - first, -1)
        chunks.append(chunk)
    return chunks


def _image_of_text(inputs: Mapping[str, Any]) -> torch.Tensor:
    """(T,) the image that a text describes, or goes with; -1 for none."""
    image_index = inputs["image_index"]
    return torch.where(image_index >= 0, image_index, inputs.get("fused_index", image_index))


def _split_images(inputs: Mapping[str, Any], num_images: int, num_chunks: int) -> list[range]:
    """About equal parts of the images, cut only where no text joins one before with one behind."""
    joined = torch.zeros(num_images + 1, dtype=torch.long)
    if "fused_index" in inputs:
        pairs = torch.stack([inputs["image_index"], inputs["fused_index"]]).cpu()  # (2, T)
        first, last = pairs[:, (pairs >= 0).all(0)].aminmax(dim=0)
        joined.index_add_(0, first + 1, torch.ones_like(first))
        joined.index_add_(0, last + 1, -torch.ones_like(last))
    cuttable = (joined.cumsum(0) == 0).tolist()  # before image i
    parts, start = [], 0
    for number in range(1, num_chunks + 1):
        end = max(start, num_images * number // num_chunks)
        while not cuttable[end]:
            end += 1
        parts.append(range(start, end))
        start = end
    return parts


def concatenate(batches: Sequence[ContrastiveBatch]) -> ContrastiveBatch:
    """The embeddings of all chunks of one process as one batch; the scale and bias are those of the first."""
    fields: dict[str, Any] = {}
    for name in batches[0].keys():
        if name not in ("target_index", "logit_scale", "logit_bias"):
            fields[name] = torch.cat([batch[name] for batch in batches])
    first_target, shifted = 0, []
    for batch in batches:
        shifted.append(torch.where(batch.target_index >= 0, batch.target_index + first_target, -1))
        first_target += len(batch.target_embeds)
    return ContrastiveBatch(
        **fields,
        target_index=torch.cat(shifted),
        logit_scale=batches[0].logit_scale,
        logit_bias=batches[0].logit_bias,
    )


class RandomState:
    """The state of the random generators at one moment, to draw the same dropout again."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.accelerator = torch.get_device_module(device).get_rng_state(device) if device.type != "cpu" else None

    def has_moved(self) -> bool:
        """Whether anything was drawn since."""
        now = RandomState(self.device)
        moved = not torch.equal(now.cpu, self.cpu)
        return moved or (self.accelerator is not None and not torch.equal(now.accelerator, self.accelerator))

    @contextmanager
    def replayed(self):
        """Draws within are those that followed the moment; the state after is as it was before."""
        before = RandomState(self.device)
        self.restore()
        yield
        before.restore()

    def restore(self):
        """Draw again what was drawn since."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)


class GradCache:
    """
    One forward and backward pass over a batch, chunk by chunk.

    Args:
        chunk_size: images whose graph is held at a time.
    """

    def __init__(self, chunk_size: int):
        self.chunk_size = chunk_size
        self._draws: bool | None = None

    def embed(self, model, chunks: Sequence[Mapping[str, Any]]) -> tuple[list[ContrastiveBatch], list[RandomState]]:
        """
        Step 1: the embeddings of each chunk, without gradients, and the random state each began with.

        Captions are left out, unless something in the model is drawn at random: then the second run has to be a
        repetition of the first.
        """
        batches, states = [], []
        for chunk in chunks:
            state = RandomState(chunk["input_ids"].device)
            batch = self._embed_chunk(model, chunk)
            if self._draws is None:
                self._draws = state.has_moved()
                if self._draws:
                    state.restore()
                    batch = self._embed_chunk(model, chunk)
            batches.append(batch)
            states.append(state)
        return batches, states

    def _embed_chunk(self, model, chunk: Mapping[str, Any]) -> ContrastiveBatch:
        if not self._draws:
            chunk = {**chunk, "labels": torch.full_like(chunk["input_ids"], IGNORED_LABEL)}
        with torch.no_grad():
            return model(**chunk, return_contrastive_batch=True).contrastive_batch

    def loss_and_gradients(
        self, batches: Sequence[ContrastiveBatch], loss_of: Callable[[ContrastiveBatch], torch.Tensor]
    ) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
        """
        Step 2.

        Args:
            batches: from [`embed`].
            loss_of: the contrastive loss of a batch of this process, which gathers those of the others.

        Returns:
            The loss, detached, and for each chunk the gradients of its `query_embeds`, `target_embeds`, `logit_scale`
            and, if there is one, `logit_bias`.
        """
        leaves = [name for name in ("query_embeds", "target_embeds") if name in batches[0]]
        scalars = [name for name in ("logit_scale", "logit_bias") if batches[0].get(name) is not None]
        whole = concatenate(batches)
        variables = {name: whole[name].detach().requires_grad_() for name in leaves + scalars}
        loss = loss_of(ContrastiveBatch(**{**whole, **variables}))
        gradients = dict(zip(variables, torch.autograd.grad(loss, list(variables.values())), strict=True))
        parts = {name: gradients[name].split([len(batch[name]) for batch in batches]) for name in leaves}
        shares = {name: gradients[name] / len(batches) for name in scalars}
        return loss.detach(), [{name: parts[name][i] for name in leaves} | shares for i in range(len(batches))]

    @staticmethod
    def surrogate(batch: ContrastiveBatch, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Step 3: a scalar whose gradient is what the chunk contributes to that of the contrastive loss."""
        return torch.stack([(batch[name] * gradient).sum() for name, gradient in gradients.items()]).sum()
