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
    case: Case, active: list[float], listed: list[float], parameter_bytes: int, optimizer_bytes: int
) -> dict:
    """
    What a step that computes only what is active cannot avoid.

    - `encoder_flops` = 2·N·F·D·L: the encoders' forward product, which alone says what is active.
    - `gather_bytes` = Σ_s N · w·J_s·D · (2·active_s + listed_s), w bytes per weight: an active feature's row of J_s·D
      weights is read forward; every listed one's again backward, for the gradient of its activation (jumprelu lists
      features inside the window that are not active); and for the gradient of an active feature's row, as many
      gradients of the reconstruction are read.
    - `gradient_bytes`: every gradient is written once.
    - `optimizer_bytes`: parameter and gradient read, parameter written, and the optimizer's state read and written.
      For Adam in one format: 7 times the parameters (reads p, g, m, v; writes p, m, v).

    Selection, the rows of the encoders' gradients and what is of the size of the batch are not counted, so the limit
    is a little lower than what any implementation can reach.

    Args:
        case: The shape.
        active: Active features per token in each layer.
        listed: Features per token in each layer that are active or receive gradient.
        parameter_bytes: Size of all parameters.
        optimizer_bytes: Size of the optimizer's state.

    Returns:
        `dict` of the four counts, and `gather_bytes_per_layer`.
    """
    weight = 2 if case.dtype == "bfloat16" else 4
    gathers = [
        round(case.tokens * (2 * here + here_listed)) * weight * targets * case.d_model
        for targets, here, here_listed in zip(case.targets, active, listed, strict=True)
    ]
    return {
        "encoder_flops": 2 * case.tokens * case.num_features * case.d_model * case.num_layers,
        "gather_bytes": sum(gathers),
        "gather_bytes_per_layer": gathers,
        "gradient_bytes": parameter_bytes,
        "optimizer_bytes": 3 * parameter_bytes + 2 * optimizer_bytes,
    }


def limit_seconds(case: Case, costs: dict, rates: dict) -> dict[str, float]:
    """
    The time that the counts need at the machine's rates, one after the other.

    A source layer's decoder costs what is cheaper, gathering its active rows or three dense products: with many active
    features the products win.

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
        min(gathered / rates["read"], product * targets)
        for targets, gathered in zip(case.targets, costs["gather_bytes_per_layer"], strict=True)
    )
    seconds = {
        "encoder": costs["encoder_flops"] / rates["gemm_encoder"],
        "decoder": decoder,
        "gradient": costs["gradient_bytes"] / rates["write"],
        "optimizer": costs["optimizer_bytes"] / rates["update"],
    }
    return {**seconds, "total": sum(seconds.values())}


__all__ = ["active_costs", "dense_flops", "limit_seconds"]
