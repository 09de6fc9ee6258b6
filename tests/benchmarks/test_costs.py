"""The counts, each worked out by hand for one small shape."""

import pytest

from benchmarks.cases import Case
from benchmarks.costs import active_costs, dense_flops, limit_seconds


CASE = Case(num_layers=2, d_model=4, num_features=8, tokens=3, l0=2)
# parameters: encoders 2·(8·4 + 8), decoders 8·4·(2 + 1), output biases 2·4, thresholds 2·8; 4 bytes each
PARAMETER_BYTES = 4 * (80 + 96 + 8 + 16)
RATES = {"gemm_encoder": 384.0, "gemm_decoder": 1e9, "read": 1056.0, "write": 400.0, "update": 1400.0}


def test_dense_operations():
    # Per token: 2 encoders of 8 x 4 forward and weight gradient, 3 blocks of 8 x 4 in three products; 2 each.
    assert dense_flops(CASE) == 3 * 2 * (2 * 2 * 32 + 3 * 3 * 32)


def test_dense_operations_of_a_transcoder_with_reach_one():
    case = Case(num_layers=2, d_model=4, num_features=8, tokens=3, l0=2, decoder_reach=1)
    assert dense_flops(case) == 3 * 2 * (2 * 2 * 32 + 3 * 2 * 32)


def test_what_the_active_features_need():
    costs = active_costs(CASE, [6, 2], [7, 3], PARAMETER_BYTES, 2 * PARAMETER_BYTES)
    assert costs["encoder_flops"] == 3 * 2 * (2 * 32)
    # Layer 0: rows of 2 x 4 floats, those of 6 active features read forward, those of 7 listed ones backward.
    assert costs["decoder_bytes_per_layer"] == [(6 + 7) * 32, (2 + 3) * 16]
    assert costs["decoder_bytes"] == 416 + 80
    assert costs["gradient_bytes"] == PARAMETER_BYTES
    assert costs["optimizer_bytes"] == 7 * PARAMETER_BYTES  # Adam: reads p, g, m, v and writes p, m, v


def test_bfloat16_weights_halve_the_rows():
    case = Case(num_layers=2, d_model=4, num_features=8, tokens=3, l0=2, dtype="bfloat16")
    assert active_costs(case, [6, 2], [7, 3], 400, 800)["decoder_bytes"] == (416 + 80) / 2


def test_the_limit_is_the_sum_of_its_parts():
    costs = active_costs(CASE, [6, 2], [7, 3], PARAMETER_BYTES, 2 * PARAMETER_BYTES)
    seconds = limit_seconds(CASE, costs, RATES | {"gemm_decoder": 1.0})
    assert seconds["encoder"] == 1.0
    assert seconds["decoder"] == pytest.approx(496 / 1056)
    assert seconds["gradient"] == 2.0
    assert seconds["optimizer"] == 4.0
    assert seconds["total"] == pytest.approx(7 + 496 / 1056)


def test_a_decoder_costs_no_more_than_its_dense_products():
    costs = active_costs(CASE, [6, 2], [7, 3], PARAMETER_BYTES, 2 * PARAMETER_BYTES)
    # One target: three products of 2·3·8·4 operations, in 0.125 s. Layer 0 (416 bytes, two targets) takes them.
    seconds = limit_seconds(CASE, costs, RATES | {"gemm_decoder": 576 / 0.125, "read": 1440.0})
    assert seconds["decoder"] == pytest.approx(0.25 + 80 / 1440)
