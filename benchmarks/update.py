"""One update as the trainer makes it, alone: to be measured (gpu_check.py), and counted (launches.py)."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_clt import CLTTrainingArguments
from hf_clt.training.optimizers import clip_grad_norm, make_optimizer

from .cases import Case
from .dense_reference import dense_losses_of
from .measure import make_clt, silence


class Update:
    """
    Forward, backward, counts of what fired, clipping, optimizer.

    Args:
        case ([`Case`]): The shape and the settings; with `dead` a share of the features never fires and is revived.
        side (`str`): "ours", or "dense": the dense reference, with fused Adam.
    """

    def __init__(self, case: Case, side: str = "ours"):
        self.case, self.is_ours = case, side == "ours"
        self.clt = make_clt(case, None)
        if self.is_ours:
            arguments = CLTTrainingArguments(optimizer=case.optimizer, learning_rate=case.learning_rate)
            self.optimizer = make_optimizer(self.clt, arguments)
        else:
            self.optimizer = torch.optim.Adam(self.clt.parameters(), lr=case.learning_rate, fused=True)
        self.dead = silence(self.clt, case) if case.dead > 0 and self.is_ours else None
        shape = case.num_layers, case.num_features
        self.steps_since_fired = torch.zeros(shape, dtype=torch.int64, device=case.device)

    def __call__(self, inputs: Tensor, labels: Tensor, mark: Callable[[], None] = lambda: None) -> Tensor:
        """
        Inputs and labels (N, L, D), raw, to the loss, (). `mark` is called before and after forward, backward with the
        counts, and the optimizer, four times.
        """
        mark()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.case.follows_autocast):
            output = self.clt(inputs, labels, dead=self.dead) if self.is_ours else None
            loss = output.loss if self.is_ours else dense_losses_of(self.clt, inputs, labels)["loss"]
        mark()
        loss.backward()
        if self.is_ours:
            fired = output.features.active_counts()
            self.steps_since_fired = torch.where(fired > 0, 0, self.steps_since_fired + 1)
        mark()
        if self.is_ours:
            clip_grad_norm(self.clt, self.optimizer, 1.0)
        else:
            torch.nn.utils.clip_grad_norm_(self.clt.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark()
        return loss.detach()


__all__ = ["Update"]
