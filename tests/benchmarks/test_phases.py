"""Bytes and operations of the phases of an update, added up by hand for a tiny shape."""

from collections import Counter

import pytest

from benchmarks.cases import Case
from benchmarks.phases import FORMATS, RATES, SHAPES, dense, floor, milliseconds, phases


def total(parts):
    counts = Counter()
    for part in parts.values():
        counts.update(part)
    return counts


def test_a_tiny_update_by_hand():
    # Two layers of four features, width 3, five tokens, one active feature: 24 encoder and 36 decoder weights, 10
    # entries, 40 pre-activations, 30 numbers like the batch, 45 of gathered decoder rows.
    case = Case(2, 3, 4, 5, 1, "batchtopk")
    after = total(phases(case, 2, 2, layer_by_layer=False))
    assert after["product"] == 2 * 5 * 24
    assert after["cache"] == 4 * 30 + 2 * 45 + 2 * 45 + 4 * 30  # values, decoding, both gradients
    memory = 16 * 24 + 2 * 40  # encoders
    memory += 2 * 40 * 17 / 16 + 40 / 64 + 168 * 10 + 600 * 10  # selection, lists
    memory += 4 * 24 + 4 * 30 + 34 * 30  # values, reconstruction, losses
    memory += 4 * 36 + 6 * 30 + 8 * 45 / 512 + 4 * 24  # gradients
    memory += 2 * 36 + 4 * 24 + 10 * 36 + 16 * 24  # norm, optimizer
    assert after["memory"] == pytest.approx(memory)
    before = total(phases(case, 2, 2, layer_by_layer=True))
    assert before["cache"] == 8 * 30 + 2 * 45 + 4 * 45 + 4 * 30
    assert total(floor(case, 2, 2)) == {
        "product": 2 * 5 * 24,
        "cache": 4 * 45,
        "memory": 4 * 24 + 4 * 40 + 4 * 36 + 4 * 24 + 10 * 36 + 16 * 24,
    }
    assert dense(case)["products"] == {"dense": 2 * 5 * (2 * 24 + 3 * 36)}


def test_rows_that_are_read_often_are_rounded_first():
    few, many = (phases(Case(2, 3, 4, n, 1, "batchtopk"), 4, 8, layer_by_layer=False)["decode"] for n in (32, 33))
    assert few == {"cache": 4 * 32 * 9, "memory": 4 * 32 * 6}  # each of 4 features in a layer is read 8 times
    assert many == {"cache": 2 * 33 * 9, "memory": 4 * 33 * 6 + 6 * 36}


@pytest.mark.parametrize("device", RATES)
@pytest.mark.parametrize("numbers", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_after_is_between_before_and_the_floor(shape, numbers, device):
    case = Case(*shape, "batchtopk")
    before, after, least = (
        sum(milliseconds(part, RATES[device]) for part in parts.values())
        for parts in (phases(case, *numbers, True), phases(case, *numbers, False), floor(case, *numbers))
    )
    assert before > after > least
