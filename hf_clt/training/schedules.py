"""Learning rate and sparsity weight as functions of the number of updates done."""

import math


def learning_rate_scale(step: int, training_steps: int, warmup_steps: int, scheduler: str) -> float:
    """
    Factor on the highest learning rate for the update number `step` (from 0): a linear rise over `warmup_steps`, then
    "linear" or "cosine" fall towards 0 at `training_steps`, or "constant" / "none".
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if scheduler in ("constant", "none"):
        return 1.0
    done = (step - warmup_steps) / max(1, training_steps - warmup_steps)
    return 1.0 - done if scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def sparsity_scale(step: int, training_steps: int, schedule: str) -> float:
    """Factor on λ for the update number `step` (from 0): linear from 0 to 1 over all of training, or constantly 1."""
    return 1.0 if schedule == "constant" else min(1.0, (step + 1) / training_steps)


def restarts_threshold(step: int, training_steps: int) -> bool:
    """
    Whether batchtopk's running threshold starts anew after `step` updates: at every power of two, and for the last
    tenth of training. Its EMA has a memory of about 1000 steps; untrained beginnings would otherwise stand in it for
    as long, and a short run would be released with a threshold of its first batch.
    """
    return step & (step - 1) == 0 or step == training_steps - training_steps // 10


__all__ = ["learning_rate_scale", "restarts_threshold", "sparsity_scale"]
