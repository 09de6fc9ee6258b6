"""Learning rate, sparsity weight and k as functions of the number of updates done."""

import math


def learning_rate_scale(
    step: int, training_steps: int, warmup_steps: int, scheduler: str, decay_steps: int = 0
) -> float:
    """
    Factor on the highest learning rate for the update number `step` (from 0): a linear rise over `warmup_steps`, then
    "linear" or "cosine" fall towards 0 at `training_steps`, or "constant" / "none", which fall linearly over the last
    `decay_steps` updates alone.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if scheduler in ("constant", "none"):
        remaining = max(1, training_steps - step)  # a run that is prolonged goes on at the lowest rate
        return min(1.0, remaining / decay_steps) if decay_steps else 1.0
    done = (step - warmup_steps) / max(1, training_steps - warmup_steps)
    return 1.0 - done if scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def sparsity_scale(step: int, training_steps: int, schedule: str, delay_steps: int = 0) -> float:
    """
    Factor on λ for the update number `step` (from 0): 0 for `delay_steps` updates, then constantly 1 or linear from 0
    to 1 over the rest of training.
    """
    if step < delay_steps:
        return 0.0
    return 1.0 if schedule == "constant" else min(1.0, (step + 1 - delay_steps) / (training_steps - delay_steps))


def annealed_k(step: int, k: int, initial_k: int, anneal_steps: int) -> int:
    """k for the update number `step` (from 0): linear from `initial_k` down to `k` over `anneal_steps` updates."""
    if step >= anneal_steps:
        return k
    return k + math.ceil((initial_k - k) * (1 - step / anneal_steps))


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
