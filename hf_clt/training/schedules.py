"""Learning rate, sparsity weight and k as functions of the number of updates done."""

import math

import torch
from torch import Tensor


def learning_rate_scale(step: int, training_steps: int, warmup_steps: int, scheduler: str, decay_steps: int) -> float:
    """
    Factor on the highest learning rate for the update number `step` (from 0): a linear rise over `warmup_steps`, then
    "linear" fall to 0 over the last `decay_steps` updates, "cosine" fall over all, or 1 ("constant" and "none").
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if scheduler == "linear":
        return min(1.0, (training_steps - step) / decay_steps)
    done = (step - warmup_steps) / max(1, training_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * done)) if scheduler == "cosine" else 1.0


def sparsity_scale(step: int, training_steps: int, schedule: str, delay_steps: int = 0) -> float:
    """
    Factor on λ for the update number `step` (from 0): 0 for `delay_steps` updates, then constantly 1 or linear from 0
    to 1 over the rest of training.
    """
    if step < delay_steps:
        return 0.0
    return 1.0 if schedule == "constant" else min(1.0, (step + 1 - delay_steps) / (training_steps - delay_steps))


def initial_steering() -> Tensor:
    """The state of [`steer_sparsity`] before training: λ as given for the first update."""
    return torch.tensor([0.0, 0.0, math.nan], dtype=torch.float64)


def steer_sparsity(state: Tensor, l0: Tensor, step: int, training_steps: int, target_l0: float) -> Tensor:
    """
    One update of the feedback that brings L0 to `target_l0`, whatever λ is: log scale = 4 · (e + Σ e / n), where
    e = log(L0 / wanted L0), within ±1, the sum is over the updates since the first eighth of training, and n is 5 % of
    training, 15 updates or more. The wanted L0 goes geometrically from that of the first update to `target_l0` over
    70 % of training.

    Args:
        state: (3,) float64: log of the factor on λ in this update, Σ e / n, log of the first update's L0 (NaN before).
        l0: () active features per layer and token that this update (number `step`, from 0) had.

    Returns:
        The state for the next update, on the same device, which is not waited for.
    """
    _, total, first = state
    log_l0 = l0.double().clamp(min=1e-3).log()
    first = torch.where(first.isnan(), log_l0, first)
    ahead = max(0.0, 1 - step / (0.7 * training_steps)) * (first - math.log(target_l0))
    error = (log_l0 - math.log(target_l0) - ahead).clamp(-1, 1)
    if step >= training_steps / 8:
        total = total + error / max(15, 0.05 * training_steps)
    return torch.stack([4 * (error + total), total, first])


def annealed_k(step: int, k: int, initial_k: int, anneal_steps: int) -> int:
    """k for the update number `step` (from 0): linear from `initial_k` down to `k` over `anneal_steps` updates."""
    if step >= anneal_steps:
        return k
    return k + math.ceil((initial_k - k) * (1 - step / anneal_steps))


def growing_reach(step: int, training_steps: int, share: float, reach: int) -> int:
    """
    Over how many target layers a source layer writes after `step` updates: from 1 up to `reach`, linearly over a
    `share` of training.
    """
    growing = share * training_steps
    return reach if step >= growing else min(reach, 1 + int(reach * step / growing))


def restarts_threshold(step: int, training_steps: int) -> bool:
    """
    Whether batchtopk's running threshold starts anew after `step` updates: when the number of updates done, or of
    those that remain (16 or more), is a power of two.

    Its EMA has a memory of about 1000 updates. In a run of a few hundred the threshold of the untrained beginning
    would still stand in it at the end, and with a falling learning rate the last thresholds differ from those shortly
    before: the released CLT would have another L0 than the one it was trained with.
    """
    remaining = training_steps - step
    return is_power_of_two(step) or (remaining >= 16 and is_power_of_two(remaining))


def last_restart(step: int, training_steps: int) -> int:
    """The last step up to `step` for which [`restarts_threshold`] is true, or 0."""
    remaining = max(16, 1 << max(0, training_steps - step - 1).bit_length())  # a power of two, so many or more
    return max(0, 1 << step.bit_length() - 1 if step else 0, training_steps - remaining)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0
