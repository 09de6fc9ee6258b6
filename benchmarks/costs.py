"""
What a training step has to do, counted: floating-point operations and bytes, and the time they need at the rates that
the machine was measured to reach.

L layers, F features per layer, D the width, N tokens, J_s the number of target layers of source layer s (their sum is
L(L+1)/2 at full reach).
"""

from .cases import Case


def dense_flops(case: Case) -> int:
    """
    Operations of a dense step: N · 2·F·D·(2L + 3·Σ_s J_s). Each encoder is multiplied forward and for its weight's
    gradient, each decoder forward and for the gradients of its activations and its weight.
    """
    return 2 * case.tokens * case.num_features * case.d_model * (2 * case.num_layers + 3 * sum(case.targets))


def active_costs(
    case: Case, active_rows: list[int], listed_rows: list[int], parameter_bytes: int, optimizer_bytes: int
) -> dict:
    """
    What a step that computes only what is active cannot avoid, if every cache did all that a cache can.

    - `encoder_flops` = 2·N·F·D·L: the encoders' forward product, which alone says what is active.
    - `decoder_bytes` = Σ_s w·J_s·D · (active_s + listed_s), w bytes per weight: the row of J_s·D weights of a feature
      that is active on any token is read forward; that of one listed on any token again backward, for the gradient of
      its activation (jumprelu lists features inside the window that are not active). A feature that fires on several
      tokens is counted once: a cache may keep its row.
    - `gradient_bytes`: every gradient is written once.
    - `optimizer_bytes`: parameter and gradient read, parameter written, and the optimizer's state read and written.
      For Adam in one format: 7 times the parameters (reads p, g, m, v; writes p, m, v).

    Selection, the decoders' norms, the sums themselves and what is of the size of the batch are not counted, so the
    limit is lower than what any implementation can reach.

    Args:
        case: The shape.
        active_rows: How many different features are active in each layer's batch.
        listed_rows: How many are active or receive gradient.
        parameter_bytes: Size of all parameters.
        optimizer_bytes: Size of the optimizer's state.

    Returns:
        `dict` of the four counts, and `decoder_bytes_per_layer`.
    """
    weight = 2 if case.dtype == "bfloat16" else 4
    rows = [
        (here + here_listed) * weight * targets * case.d_model
        for targets, here, here_listed in zip(case.targets, active_rows, listed_rows, strict=True)
    ]
    return {
        "encoder_flops": 2 * case.tokens * case.num_features * case.d_model * case.num_layers,
        "decoder_bytes": sum(rows),
        "decoder_bytes_per_layer": rows,
        "gradient_bytes": parameter_bytes,
        "optimizer_bytes": 3 * parameter_bytes + 2 * optimizer_bytes,
    }


def limit_seconds(case: Case, costs: dict, rates: dict) -> dict[str, float]:
    """
    The time that the counts need at the machine's rates, one after the other.

    A source layer's decoder costs what is cheaper, reading its rows or three dense products.

    Args:
        case: The shape.
        costs: What [`active_costs`] returned.
        rates: `gemm_encoder` and `gemm_decoder` in operations per second; `read`, `write` and `update` (read and write
            in place) in bytes per second.

    Returns:
        `dict`: seconds of `encoder`, `decoder`, `gradient`, `optimizer` and their sum, `total`.
    """
    product = 3 * 2 * case.tokens * case.num_features * case.d_model / rates["gemm_decoder"]
    decoder = sum(
        min(size / rates["read"], product * targets)
        for targets, size in zip(case.targets, costs["decoder_bytes_per_layer"], strict=True)
    )
    seconds = {
        "encoder": costs["encoder_flops"] / rates["gemm_encoder"],
        "decoder": decoder,
        "gradient": costs["gradient_bytes"] / rates["write"],
        "optimizer": costs["optimizer_bytes"] / rates["update"],
    }
    return {**seconds, "total": sum(seconds.values())}


__all__ = ["active_costs", "dense_flops", "limit_seconds"]
