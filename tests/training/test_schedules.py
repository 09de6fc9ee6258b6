"""Learning rate, sparsity weight, its feedback and threshold restarts, by hand."""

import math

import pytest
import torch

from hf_clt.training.schedules import (
    annealed_k,
    growing_reach,
    initial_steering,
    last_restart,
    learning_rate_scale,
    restarts_threshold,
    sparsity_scale,
    steer_sparsity,
)


SCHEDULERS = ("linear", "cosine", "constant", "none")


def scales(steps, warmup, scheduler):
    return [learning_rate_scale(step, steps, warmup, scheduler, steps - warmup) for step in range(steps)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_warm_up_rises_by_equal_steps_to_the_highest_rate(scheduler):
    assert scales(10, 4, scheduler)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_without_warm_up_the_first_update_is_at_the_highest_rate(scheduler):
    assert scales(10, 0, scheduler)[0] == 1.0


def test_linear_falls_by_equal_steps_to_just_above_zero():
    assert scales(10, 0, "linear") == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert scales(6, 2, "linear")[2:] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine():
    expected = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert scales(8, 0, "cosine") == pytest.approx(expected)
    assert scales(10, 2, "cosine")[2:] == pytest.approx(expected)
    assert scales(8, 0, "cosine")[4] == pytest.approx(0.5)


@pytest.mark.parametrize("scheduler", ["constant", "none"])
def test_constant_stays(scheduler):
    assert scales(10, 3, scheduler)[3:] == [1.0] * 7


def test_linear_falls_at_the_end():
    found = [learning_rate_scale(step, 10, 2, "linear", decay_steps=4) for step in range(10)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (1, 1), (2, 2), (100, 99), (100, 100)])
def test_every_update_has_a_rate_above_zero(scheduler, steps, warmup):
    assert all(0 < scale <= 1 for scale in scales(steps, warmup, scheduler))


def test_sparsity_rises_over_all_of_training():
    assert [sparsity_scale(step, 5, "linear") for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert sparsity_scale(7, 5, "linear") == 1.0  # a run that is prolonged


def test_sparsity_can_be_constant():
    assert [sparsity_scale(step, 5, "constant") for step in range(5)] == [1.0] * 5


def test_sparsity_can_be_delayed():
    assert [sparsity_scale(step, 6, "linear", 2) for step in range(6)] == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1.0])
    assert [sparsity_scale(step, 6, "constant", 2) for step in range(6)] == [0, 0, 1, 1, 1, 1]


def test_the_feedback_on_lambda_by_its_formula():
    """log scale = 4 (e + Σ e / n), in Python's float64, over lengths on either side of n = 15."""
    generator = torch.Generator().manual_seed(0)
    for steps, target in ((50, 8.0), (400, 100.0)):
        measured = (torch.rand(steps, generator=generator, dtype=torch.float64) * 60 + 5).tolist()
        measured[3], total, state = 0.0, 0.0, initial_steering()
        assert state.dtype == torch.float64 and state[0] == 0  # λ as given in the first update
        for step, l0 in enumerate(measured):
            state = steer_sparsity(state, torch.tensor(l0), step, steps, target)
            part = min(1, step / (0.7 * steps))
            wanted = measured[0] ** (1 - part) * target**part
            error = min(1, max(-1, math.log(max(torch.tensor(l0).item(), 1e-3) / wanted)))
            total += error / max(15, 0.05 * steps) if step >= steps / 8 else 0
            assert state[0].item() == pytest.approx(4 * (error + total), abs=1e-6)  # L0 comes in float32


@pytest.mark.parametrize("given", [1e-3, 1.0, 1e3])  # the λ that was given, as a share of the one that is needed
@pytest.mark.parametrize("steps, lag", [(100, 5), (100, 10), (1000, 10), (1000, 100), (10_000, 10), (10_000, 1000)])
def test_the_feedback_ends_at_the_target(steps, lag, given):
    """Of an L0 that goes with λ^-0.8, late, less and less as the learning rate falls, and with noise of 5 %."""
    generator = torch.Generator().manual_seed(0)
    state, l0 = initial_steering(), 64.0
    for step in range(steps):
        noise = math.exp(0.05 * torch.randn((), generator=generator).item())
        state = steer_sparsity(state, torch.tensor(l0 * noise), step, steps, 16.0)
        reached = 16 * (given * math.exp(state[0].item())) ** -0.8
        l0 *= (min(max(reached, 1e-9), 1024.0) / l0) ** ((1 - step / steps) / lag)
    assert l0 == pytest.approx(16, rel=0.05)


def test_k_comes_down_by_equal_steps_and_never_below_k():
    assert [annealed_k(step, 4, 12, 4) for step in range(7)] == [12, 10, 8, 6, 4, 4, 4]
    assert [annealed_k(step, 4, 7, 5) for step in range(6)] == [7, 7, 6, 6, 5, 4]  # rounded up
    assert annealed_k(0, 4, 4, 3) == 4
    assert annealed_k(0, 4, 12, 0) == 4


def test_thresholds_restart_at_powers_of_two_from_either_end():
    restarts = [step for step in range(100) if restarts_threshold(step, 100)]
    assert restarts == [1, 2, 4, 8, 16, 32, 36, 64, 68, 84]


@pytest.mark.parametrize("steps", [2, 5, 9, 12])
def test_a_short_run_ends_with_a_threshold_of_its_end(steps):
    """The last restart leaves at most half of the run behind it, and at least one update after it."""
    last = max(step for step in range(steps) if restarts_threshold(step, steps))
    assert steps / 2 <= last + 1 <= steps


@pytest.mark.parametrize("steps", [1, 5, 16, 17, 100, 240, 1000])
def test_the_last_restart_by_looking_back(steps):
    last = 0
    for step in range(steps):
        last = step if restarts_threshold(step, steps) else last
        assert last_restart(step, steps) == last, step


def test_reach_grows_linearly_over_its_share():
    assert [growing_reach(step, 20, 0.5, 4) for step in range(12)] == [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4]
    assert growing_reach(0, 20, 0.0, 4) == 4
    assert growing_reach(1, 10, 0.05, 30) == 30  # a share of less than an update
