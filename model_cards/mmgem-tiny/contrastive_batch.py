"""The inputs of the contrastive loss, and how the processes of a distributed run put them together."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers.utils import ModelOutput

IMAGE, REGION, DOCUMENT = 0, 1, 2  # modalities: what a text was written for; a document is another text
REGION_BITS = 20  # of a target id: the number of the box in its image
# The columns of a `ContrastiveBatch` that have a row for each query, and for each target; the embeddings first.
COLUMNS = {
    "query": ("query_embeds", "target_index", "query_ids", "query_modality"),
    "target": ("target_embeds", "target_ids", "target_modality"),
}


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """Number of rows that each process holds, in the order of ranks."""
    if not is_distributed():
        return [size]
    sizes = torch.empty(dist.get_world_size(), dtype=torch.long, device=device)
    dist.all_gather_single(sizes, torch.tensor([size], device=device))
    return sizes.tolist()


def gather_rows(rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Concatenate the rows of all processes, in the order of ranks; gradients flow back to the process they came from.

    Args:
        rows: (N_rank, ...), N_rank may differ between processes.
        sizes: N_rank of every process, from [`gather_sizes`].

    Returns:
        (sum of N_rank, ...), on every process.
    """
    if not is_distributed() or max(sizes) == 0:
        return rows
    from torch.distributed._functional_collectives import all_gather_single, all_gather_single_autograd

    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])]).contiguous()
    gather = all_gather_single_autograd if rows.requires_grad else all_gather_single
    gathered = gather(padded, 0, dist.group.WORLD).view(len(sizes), max(sizes), *rows.shape[1:])
    return torch.cat([gathered[rank, :size] for rank, size in enumerate(sizes)])


def token_row_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """A 64-bit fingerprint of each token row, equal for equal texts whatever their padding.

    Args:
        input_ids: (T, L); attention_mask: (T, L).

    Returns:
        (T,) long.
    """
    multiplier = 6364136223846793005  # of Knuth's MMIX generator; odd, so no power of it vanishes modulo 2**64
    power = torch.where(attention_mask.bool(), multiplier, 1).cumprod(-1)
    return ((input_ids + 1) * power * attention_mask).sum(-1)


def ids_of_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, fused_index: torch.Tensor, image_ids: torch.Tensor
) -> torch.Tensor:
    """As [`token_row_ids`], of texts that go with images: equal if the text and all its images are, in their order.

    Args:
        input_ids, attention_mask: (T, L).
        fused_index: (T, F) the images of each text, -1 for none.
        image_ids: (I,).

    Returns:
        (T,) long.
    """
    multiplier = 2862933555777941757  # odd, of another generator, so that the sum of both tells them apart
    is_fused = fused_index >= 0  # (T, F)
    power = torch.where(is_fused, multiplier, 1).cumprod(-1)  # (T, F)
    image_ids_of_text = torch.zeros_like(fused_index)  # (T, F)
    image_ids_of_text[is_fused] = image_ids[fused_index[is_fused]] + 1
    return token_row_ids(input_ids, attention_mask) + (image_ids_of_text * power).sum(-1)


def default_image_ids(num_images: int, device: torch.device) -> torch.Tensor:
    """(I,) ids that no image shares with another, on any process."""
    first = dist.get_rank() << 32 if is_distributed() else 0
    return torch.arange(num_images, device=device) + first


def ids_of_regions(image_ids: torch.Tensor, num_boxes: int) -> torch.Tensor:
    """(I,) ids of images -> (I, R) ids of their boxes, which still tell the image."""
    return (image_ids[:, None] << REGION_BITS) + torch.arange(num_boxes, device=image_ids.device)


@dataclass
class ContrastiveBatch(ModelOutput):
    """The texts (queries) and the images, regions and documents (targets) of one process, or after `gather` of all of
    them. Both may be fused: a text with an image.

    Args:
        query_embeds: (Q, D) unit vectors, or (Q, k, D).
        target_embeds: (P, D) unit vectors, or (P, k, D).
        target_index: (Q,) long, row of `target_embeds` that each query was written for; -1 for a hard negative, a text
            that describes nothing.
        query_ids: (Q,) long, equal for equal texts.
        target_ids: (P,) long, equal for copies of one image; for regions [`ids_of_regions`].
        query_modality: (Q,) long, `IMAGE`, `REGION` or `DOCUMENT`: the kind of target that a text was written for.
        target_modality: (P,) long, likewise.
        logit_scale: Scalar, the inverse temperature.
        logit_bias: Scalar or None; the sigmoid form needs it, to InfoNCE it makes no difference.
    """

    query_embeds: torch.Tensor = None
    target_embeds: torch.Tensor = None
    target_index: torch.Tensor = None
    query_ids: torch.Tensor = None
    target_ids: torch.Tensor = None
    query_modality: torch.Tensor = None
    target_modality: torch.Tensor = None
    logit_scale: torch.Tensor = None
    logit_bias: torch.Tensor | None = None

    def gather(self) -> "ContrastiveBatch":
        """The batch of all processes, in the order of ranks, on each of them; gradients flow back.

        Processes may hold different numbers of rows, none included; all run the same sequence of collectives.
        """
        if not is_distributed():
            return self
        device = self.query_embeds.device
        sizes = {side: gather_sizes(len(getattr(self, names[0])), device) for side, names in COLUMNS.items()}
        first_target = sum(sizes["target"][: dist.get_rank()])
        own = replace(self, target_index=torch.where(self.target_index < 0, -1, self.target_index + first_target))
        rows = ((name, side) for side, names in COLUMNS.items() for name in names)
        return replace(own, **{name: gather_rows(getattr(own, name), sizes[side]) for name, side in rows})

    def in_float32(self) -> "ContrastiveBatch":
        """Half precision numbers as float32; the rest stays."""
        names = ("query_embeds", "target_embeds", "logit_scale", "logit_bias")
        numbers = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(
            self, **{name: n.to(torch.promote_types(n.dtype, torch.float32)) for name, n in numbers.items()}
        )

    def check(self):
        """Refuse a batch whose parts do not fit together.

        Raises:
            ValueError: If shapes do not fit together, or an index points to no target or to one of the other modality.
        """
        for embeds_name, *names in COLUMNS.values():
            embeds = getattr(self, embeds_name)
            if embeds.ndim not in (2, 3):
                raise ValueError(f"`{embeds_name}` has shape {tuple(embeds.shape)}; expected (N, D) or (N, k, D).")
            for name in names:
                if getattr(self, name).shape != embeds.shape[:1]:
                    raise ValueError(
                        f"`{name}` has shape {tuple(getattr(self, name).shape)}; expected ({len(embeds)},), a number "
                        f"for each row of `{embeds_name}`."
                    )
        if self.query_embeds.shape[-1] != self.target_embeds.shape[-1]:
            raise ValueError(
                f"`query_embeds` has {self.query_embeds.shape[-1]} dimensions, but `target_embeds` has "
                f"{self.target_embeds.shape[-1]}; expected the same number."
            )
        if (self.target_index >= len(self.target_embeds)).any():
            raise ValueError(
                f"`target_index` goes up to {self.target_index.max()}; expected rows of `target_embeds`, below "
                f"{len(self.target_embeds)}."
            )
        describing = self.target_index >= 0
        if (self.target_modality[self.target_index[describing]] != self.query_modality[describing]).any():
            raise ValueError(
                "`query_modality` differs from the `target_modality` of the target that `target_index` names."
            )
