"""
Averaged weights, which are what a run is used with: torch's AveragedModel, whose update waits for no GPU.

    averaged <- decay * averaged + (1 - decay) * weights,      after every step of the optimizer

torch.optim.swa_utils copies a counter to the GPU in each update, for averages that need it. Such a copy
stands in line behind all kernels: Python waits until the step is computed and only then launches the next.
"""
import torch
from torch.optim.swa_utils import AveragedModel


class Averages(AveragedModel):
    """AveragedModel with an exponential moving average. Its state dict and its numbers are torch's own."""

    def __init__(self, model, decay):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model):
        """Take over the model's weights the first time, then move towards them. Buffers are copied."""
        averaged = list(self.module.parameters())
        weights = list(model.parameters())
        if self.n_averaged == 0:                            # the counter lies on the CPU: no wait
            for ours, theirs in zip(averaged, weights):     # once, and DTensors have no _foreach_copy_
                ours.copy_(theirs)
        else:
            torch._foreach_lerp_(averaged, weights, 1 - self.decay)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.n_averaged += 1
