"""One step of training, whose parts can be measured apart."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.measure import peak_memory


class TrainingStep:
    """Forward, backward, AdamW (fused, as `Trainer` has it), gradients set to none.

    Args:
        model: Whose trainable parameters are updated.
        loss: The forward pass.
        bf16: Run it under autocast to bfloat16, as `Trainer` does with `bf16=True`.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], torch.Tensor], bf16: bool = False):
        self.model, self.loss, self.bf16 = model, loss, bf16
        self.device = next(model.parameters()).device
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def __call__(self):
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward_backward(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss()
        loss.backward()

    def peak_memory(self) -> int:
        """Bytes that forward and backward need at most, gradients included."""
        highest = peak_memory(self.forward_backward, str(self.device))
        self.optimizer.zero_grad()
        return highest

    def resident_memory(self) -> int:
        """Bytes of the weights and of the optimizer's state, which are there from the second step on."""
        moments = 2 * sum(p.nbytes for group in self.optimizer.param_groups for p in group["params"])
        return sum(parameter.nbytes for parameter in self.model.parameters()) + moments
