"""Models of which each process holds only a part of every parameter: FSDP2, ZeRO-3."""

import torch
import torch.distributed as dist
from torch import nn

_FORWARD_METHODS = ("get_image_features", "get_text_features", "get_multimodal_features")


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of the parameters."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter (or its gradient, or a norm of them) in full, on every process; all of them call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def adapt_to_fsdp(model: nn.Module) -> None:
    """
    Once a model is wrapped by FSDP2, let its parameters be gathered for all that embeds, which FSDP does for `forward`
    alone, and let it be saved with its own code: FSDP2 makes its class one of torch's, whose file would be copied.

    Args:
        model: an `MMGEMModel`, or one with LoRA, after `fully_shard`.
    """
    for method in _FORWARD_METHODS:
        dist.fsdp.register_fsdp_forward_method(model, method)
    wrapped, own = type(model), type(model).__mro__[2]  # FSDPMMGEMModel, FSDPModule, MMGEMModel
    wrapped.__module__, wrapped.__name__, wrapped.__qualname__ = own.__module__, own.__name__, own.__qualname__


def reshard(model: nn.Module) -> None:
    """Give up what FSDP2 keeps gathered after a forward pass: it would be out of date once the parameters change."""
    for module in model.modules():
        if isinstance(module, dist.fsdp.FSDPModule):
            module.reshard()
