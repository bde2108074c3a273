"""GradCache: contrastive batches larger than memory, https://arxiv.org/abs/2101.06983.

1. Every chunk is embedded without gradients. 2. The contrastive loss of all embeddings, of all processes, gives the
gradient of each embedding. 3. Every chunk runs again, with gradients, and its embeddings are pulled along theirs. So
the graph of one chunk is all that memory has to hold, and the gradient is that of the whole batch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mmgem.contrastive_batch import ContrastiveBatch, default_image_ids, gather_sizes
from mmgem.text_rows import IGNORED_LABEL, TEXT_COLUMNS, Role, pointers, select_texts

PER_IMAGE = ("pixel_values", "patch_features", "pixel_attention_mask", "spatial_shapes", "boxes", "image_ids")


def split_batch(inputs: Mapping[str, Any], chunk_size: int) -> list[dict[str, Any]]:
    """Divide a batch of the joint loss into chunks of about `chunk_size` images, each with the texts about its images.

    Texts without an image are dealt out evenly. What points to each other stays together: the images that a text has
    to do with, and texts that point to texts. So a chunk may be larger. Every process gets as many chunks as the one
    with the most images.

    Args:
        inputs: As `MMGEMCollator` gives them.
        chunk_size: Images, at least 1.

    Returns:
        The chunks; in each, images and texts that others point to count within the chunk.
    """
    device, num_texts = inputs["input_ids"].device, len(inputs["input_ids"])
    inputs = {"image_index": torch.arange(num_texts, device=device), **inputs}
    num_images = count_images(inputs)
    num_chunks = max(gather_sizes(-(-max(num_images, 1) // chunk_size), device))
    if "image_ids" not in inputs and num_images:
        inputs = {**inputs, "image_ids": default_image_ids(num_images, device)}
    first, last = _images_of_texts(inputs, num_images)  # (T,) each
    images = _split_images(first, last, num_images, num_chunks)
    sizes = torch.tensor([len(part) for part in images], device=device)
    chunk_of_image = torch.repeat_interleave(torch.arange(num_chunks, device=device), sizes)  # (I,)
    chunk_of_text = _first_of_group(inputs, torch.arange(num_texts, device=device)) * num_chunks // max(num_texts, 1)
    has_image = last >= 0  # (T,)
    chunk_of_text[has_image] = chunk_of_image[first[has_image]]  # (T,)

    others = {name: value for name, value in inputs.items() if name not in (*PER_IMAGE, *TEXT_COLUMNS)}
    chunks = []
    for number, part in enumerate(images):
        texts = (chunk_of_text == number).nonzero()[:, 0]  # (T_c,)
        chunk = others | select_texts(inputs, texts, part)
        if len(part):  # slices are views, not copies
            chunk |= {name: inputs[name][part.start : part.stop] for name in PER_IMAGE if name in inputs}
        chunks.append(chunk)
    return chunks


def count_images(inputs: Mapping[str, Any]) -> int:
    """Count the images of a batch, which may have the features of a frozen tower in place of pixels."""
    return next((len(inputs[name]) for name in ("pixel_values", "patch_features") if name in inputs), 0)


def _images_of_texts(inputs: Mapping[str, Any], num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) first and last image that a text, or one that is joined with it, points to; last is -1 without any."""
    columns = pointers(inputs, Role.IMAGE).values()
    index = torch.cat([index if index.ndim == 2 else index[:, None] for index in columns], dim=1)  # (T, pointers)
    first = index.masked_fill(index < 0, num_images).amin(dim=1)  # (T,)
    return _first_of_group(inputs, first), -_first_of_group(inputs, -index.amax(dim=1))


def _first_of_group(inputs: Mapping[str, Any], numbers: torch.Tensor) -> torch.Tensor:
    """(T,) the smallest of the numbers, (T,), of the texts that are joined by pointers to texts."""
    edges = [
        torch.stack([(rows >= 0).nonzero()[:, 0], rows[rows >= 0]]) for rows in pointers(inputs, Role.TEXT).values()
    ]
    if not edges:
        return numbers
    source, target = torch.cat(edges, dim=1)  # (E,) each
    while True:
        smallest = numbers.scatter_reduce(0, source, numbers[target], "amin")
        smallest = smallest.scatter_reduce(0, target, smallest[source], "amin")
        if torch.equal(smallest, numbers):
            return numbers
        numbers = smallest


def _split_images(first: torch.Tensor, last: torch.Tensor, num_images: int, num_chunks: int) -> list[range]:
    """About equal parts of the images, cut only where no text joins one before the cut with one after it."""
    has_image = last >= 0  # (T,)
    first, last = first[has_image].cpu(), last[has_image].cpu()
    joined = torch.zeros(num_images + 1, dtype=torch.long)
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
    """One forward and backward pass over a batch, chunk by chunk.

    Args:
        chunk_size: Images whose graph is held at a time.
    """

    def __init__(self, chunk_size: int):
        self.chunk_size = chunk_size
        self._draws: bool | None = None

    def embed(self, model, chunks: Sequence[Mapping[str, Any]]) -> tuple[list[ContrastiveBatch], list[RandomState]]:
        """Step 1: the embeddings of each chunk, without gradients, and the random state each began with.

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
        """Step 2.

        Args:
            batches: From [`embed`].
            loss_of: The contrastive loss of a batch of this process, which gathers those of the others.

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
