"""Parameters that towers bring along and MM-GEM has no use for: poolers, mask tokens, a norm behind the last layer."""

import torch


def freeze_unused(model) -> list[str]:
    """
    Stop training the parameters of the vision tower that its patch features do not depend on.

    They would never get a gradient. DDP would have to search every step's graph for them, and cannot do so under
    gradient checkpointing; FSDP2 could not resume, as it expects an optimizer state for each parameter that trains.

    Args:
        model: an `MMGEMModel`, or one with LoRA, before it is handed to DDP or FSDP.

    Returns:
        The names of the parameters that this call has frozen.
    """
    vision_config = model.config.vision_config
    size = vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    trained = {name: p for name, p in model.named_parameters() if "vision_tower." in name and p.requires_grad}
    if not trained:
        return []
    was_training = model.training
    model.eval()  # nothing is drawn at random
    pixel_values = torch.zeros(1, vision_config.num_channels, height, width, dtype=model.dtype, device=model.device)
    tokens = model.get_image_features(pixel_values).last_hidden_state
    model.train(was_training)
    gradients = torch.autograd.grad(tokens.sum(), list(trained.values()), allow_unused=True)
    unused = [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
    for name in unused:
        trained[name].requires_grad_(False)
    return unused
