"""Learning rate, sparsity weight and threshold restarts, by hand."""

import math

import pytest

from hf_clt.training.schedules import (
    annealed_k,
    last_restart,
    learning_rate_scale,
    restarts_threshold,
    sparsity_scale,
)


SCHEDULERS = ("linear", "cosine", "constant", "none")


def scales(steps, warmup, scheduler):
    return [learning_rate_scale(step, steps, warmup, scheduler) for step in range(steps)]


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


@pytest.mark.parametrize("scheduler", ["constant", "none"])
def test_constant_with_a_final_decay(scheduler):
    found = [learning_rate_scale(step, 10, 2, scheduler, decay_steps=4) for step in range(10)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert learning_rate_scale(15, 10, 2, scheduler, decay_steps=4) == 0.25  # a run that is prolonged


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
