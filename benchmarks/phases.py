"""
What each phase of an update takes on a GPU, modelled from the bytes and operations of the kernels as they are written,
before and after all layers were worked on at once. It is a model; an update on an H200 took 16 to 35 % more
(docs/scale.md):

  python -m benchmarks.phases --device H100

Rates of an H200 are what a copy, a large product and gathers mostly from the L2 cache reached there
(benchmarks/README.md); those of an H100 are assumed: the same chip with slower memory. A phase takes the sum of its
bytes and operations over these rates; launches cost nothing here, and nothing overlaps.

- "Before" is too low: torch's top-k and multiplying bfloat16 gradients in place took several times their bytes.
- The floor is what no arrangement avoids: the encoders' product and its result, each decoder row of an active entry
  gathered once forward and once backward in bfloat16, weights and gradients passed once, the optimizer's bytes, the
  language model.
- Dense is one product per layer and direction at 600 TFLOP/s in bfloat16 (the encoders' reached 608 to 695 on an
  H200), passes over its pre-activations, activations and their gradients, and the same optimizer.
"""

import argparse

from hf_clt.kernels.decode import ROUND_ABOVE

from .cases import Case


# Bytes per second of memory and of gathers from L2, operations per second of large products in bfloat16, and of those
# of a dense step.
RATES = {
    "H100": {"memory": 3.0e12, "cache": 5.5e12, "product": 800e12, "dense": 600e12},
    "H200": {"memory": 4.3e12, "cache": 8.5e12, "product": 820e12, "dense": 600e12},
}
LIST_BYTES = 600  # passed for each entry by the operators on lists (places, orders, activations); added up by hand
SHAPES = {
    "A": (12, 768, 24_576, 4_096, 32),
    "A, k 200": (12, 768, 24_576, 4_096, 200),
    "B": (30, 576, 8_192, 4_096, 32),
    "C": (26, 2_304, 16_384, 4_096, 50),
}
LANGUAGE_MODEL = {"A": 85e6, "A, k 200": 85e6, "B": 106e6, "C": 2.0e9}  # weights of the blocks
FORMATS = {  # of decoders, optimizer: bytes of a weight, of its state
    "bfloat16, adam_compact": (2, 2),
    "float32, adam": (4, 8),
}


def phases(case: Case, weight: int, state: int, layer_by_layer: bool) -> dict[str, dict[str, float]]:
    """
    Bytes of memory and of the cache, and operations, of the phases of an update of batchtopk under autocast.

    Args:
        case: The shape.
        weight: Bytes of a decoder weight; those of encoders have 4.
        state: Bytes of optimizer state per decoder weight.
        layer_by_layer: Whether as before, one source layer at a time.
    """
    L, D, F, N, k = case.num_layers, case.d_model, case.num_features, case.tokens, case.l0
    targets = L * (L + 1) // 2
    encoders, decoders, entries, batch = L * F * D, targets * F * D, N * k * L, N * L * D
    rows = N * k * targets * D  # numbers of all decoder rows that the entries gather
    each_target = N * targets * D  # numbers that a source writes to each of its targets
    encoder_state = 8 if state == 8 else 2
    # Under autocast rows that are read often are rounded first.
    is_rounded = weight == 4 and not layer_by_layer and N * k > ROUND_ABOVE * F
    return {
        # Weights are rounded (6); after, they are stacked (8) into rows that were set to zero (2). Pre-activations.
        "encoders": {
            "product": 2 * N * encoders,
            "memory": (6 if layer_by_layer else 16) * encoders + 2 * N * F * L,
        },
        # `positions_largest`: entries, maxima of groups, the groups that can hold what is sought; lists and bits.
        "selection": {"memory": (2 * (1 + 1 / 16) + 1 / 64) * N * F * L + (128 + 40) * entries},
        "lists of entries": {"memory": LIST_BYTES * entries},
        # Computed again in float32: an input and an encoder row each; after, those by feature once.
        "values": {"cache": 8 * entries * D} if layer_by_layer else {"cache": 4 * entries * D, "memory": 4 * encoders},
        "decode": {
            "cache": rows * (2 if is_rounded else weight),
            # Before, what a source writes is written, read, and added to the reconstruction.
            "memory": (8 + 2 * weight) * each_target if layer_by_layer else 4 * batch + 6 * decoders * is_rounded,
        },
        # Squares of differences and their sum, and the gradient; labels in bfloat16 are made float32 first.
        "losses": {"memory": (28 + 6 * (weight == 2)) * batch},
        # The reconstruction's gradient, which autocast rounds, is gathered once for both results, whose dot products
        # are written and read for each tile of 1,024 bytes of weights. Before, twice, from a slice for each source.
        "gradients of decoders": {
            "cache": rows * (2 * weight if layer_by_layer else 2),
            "memory": 2 * weight * decoders
            + ((8 if weight == 4 else 14) * each_target if layer_by_layer else 6 * batch + 8 * rows * weight / 1024),
        },
        "gradients of encoders": {"cache": 4 * entries * D, "memory": 4 * encoders},
        # The norm reads all gradients; before they were multiplied in place as well.
        "clipping": {"memory": (3 if layer_by_layer else 1) * (weight * decoders + 4 * encoders)},
        "update": {"memory": (3 * weight + 2 * state) * decoders + (12 + 2 * encoder_state) * encoders},
    }


def floor(case: Case, weight: int, state: int) -> dict[str, dict[str, float]]:
    """The same of what no arrangement avoids."""
    L, D, F, N, k = case.num_layers, case.d_model, case.num_features, case.tokens, case.l0
    targets = L * (L + 1) // 2
    encoders, decoders, rows = L * F * D, targets * F * D, N * k * targets * D
    return {
        "encoders": {"product": 2 * N * encoders, "memory": 4 * encoders + 4 * N * F * L},
        "decode": {"cache": 2 * rows},
        "gradients": {"cache": 2 * rows, "memory": 2 * weight * decoders + 4 * encoders},
        "update": {"memory": (3 * weight + 2 * state) * decoders + 16 * encoders},
    }


def dense(case: Case) -> dict[str, dict[str, float]]:
    """The same of products over all features, in bfloat16."""
    L, D, F, N = case.num_layers, case.d_model, case.num_features, case.tokens
    encoders, decoders = L * F * D, L * (L + 1) // 2 * F * D
    ours = phases(case, 2, 2, layer_by_layer=False)
    return {name: ours[name] for name in ("losses", "clipping", "update")} | {
        # Forward, and backward to the weights and to the activations.
        "products": {"dense": 2 * N * (2 * encoders + 3 * decoders)},
        # Eight passes of 2 bytes: written, selected, multiplied with the mask, forward and backward.
        "activations": {"memory": 16 * N * F * L},
    }


def milliseconds(counts: dict[str, float], rates: dict[str, float]) -> float:
    return 1000 * sum(number / rates[kind] for kind, number in counts.items())


def format_table(device: str, form: str) -> str:
    """A Markdown table of milliseconds, before and after."""
    rates, numbers = RATES[device], FORMATS[form]
    columns = {}
    for name, (L, D, F, N, k) in SHAPES.items():
        case = Case(L, D, F, N, k, "batchtopk")
        model = {"product": 2 * N * LANGUAGE_MODEL[name]}
        before, after = (
            phases(case, *numbers, layer_by_layer=each) | {"language model": model} for each in (True, False)
        )
        rest = (part | {"language model": model} for part in (floor(case, *numbers), dense(case)))
        columns[name] = before, after, *rest
    lines = [f"| {device}, {form} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for phase in before:
        cells = [
            f"{milliseconds(b[phase], rates):.1f}, {milliseconds(a[phase], rates):.1f}"
            for b, a, *_ in columns.values()
        ]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    totals = [[sum(milliseconds(c, rates) for c in part.values()) for part in parts] for parts in columns.values()]
    lines.append("| **total** | " + " | ".join(f"{b:.0f}, **{a:.0f}**" for b, a, *_ in totals) + " |")
    lines.append("| floor, and its share | " + " | ".join(f"{f:.0f}, {f / a:.0%}" for _, a, f, _ in totals) + " |")
    lines.append(
        "| dense in bfloat16, and over ours | " + " | ".join(f"{d:.0f}, {d / a:.1f}" for _, a, _, d in totals) + " |"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=RATES, default="H100", help="whose rates (default H100)")
    options = parser.parse_args(argv)
    print("\n\n".join(format_table(options.device, form) for form in FORMATS))


if __name__ == "__main__":
    main()


__all__ = ["dense", "floor", "milliseconds", "phases"]
