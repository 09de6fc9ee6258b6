"""
What each phase of an update takes on a GPU, modelled from the bytes and operations of the kernels as they are written,
before and after all layers were worked on at once. Modelled, not measured:

  python -m benchmarks.phases --device H100

Rates are what a copy, a large product and gathers from the L2 cache reached on such cards (benchmarks/README.md). A
phase takes the sum of its bytes and operations over these rates; launches cost nothing here, and nothing overlaps.
The floor is what no arrangement avoids: the encoders' product and its result, each decoder row of an active entry
gathered once forward and once backward, weights and gradients passed once, the optimizer's bytes, the language model.
"""

import argparse

from .cases import Case


# Bytes per second of memory and of gathers from L2, operations per second of products in bfloat16.
RATES = {
    "H100": {"memory": 3.0e12, "cache": 5.5e12, "product": 800e12},
    "H200": {"memory": 4.3e12, "cache": 8.5e12, "product": 820e12},
}
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
    rounded = weight if layer_by_layer else 2  # the reconstruction's gradient; autocast rounds it, in one pass
    encoder_state = 8 if state == 8 else 2
    # Under autocast rows that are read often are rounded first.
    is_rounded = weight == 4 and not layer_by_layer and N * k > 6 * F
    return {
        "encoders": {
            "product": 2 * N * encoders,
            # Rounded weights; where layers are stacked first that is a copy more. Pre-activations, written.
            "memory": (6 if layer_by_layer else 14) * encoders + 2 * N * F * L,
        },
        # Maxima of groups, then the groups that can hold what is sought.
        "selection": {"memory": 2 * N * F * L * 1.1},
        "values": {"cache": 8 * entries * D} if layer_by_layer else {"cache": 4 * entries * D, "memory": 4 * encoders},
        "decode": {
            "cache": rows * (2 if is_rounded else weight),
            "memory": (8 * N * targets * D if layer_by_layer else 8 * batch) + 6 * decoders * is_rounded,
        },
        "losses": {"memory": 40 * batch},
        "gradients of decoders": {
            "cache": rows * (2 * weight if layer_by_layer else rounded),
            "memory": 2 * weight * decoders + ((4 + weight) * N * targets * D if layer_by_layer else 8 * batch),
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
        columns[name] = before, after, floor(case, *numbers) | {"language model": model}
    lines = [f"| {device}, {form} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for phase in before:
        cells = [
            f"{milliseconds(b[phase], rates):.1f}, {milliseconds(a[phase], rates):.1f}" for b, a, _ in columns.values()
        ]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    totals = [[sum(milliseconds(c, rates) for c in part.values()) for part in parts] for parts in columns.values()]
    lines.append("| **total** | " + " | ".join(f"{b:.0f}, **{a:.0f}**" for b, a, _ in totals) + " |")
    lines.append("| floor, and its share | " + " | ".join(f"{f:.0f}, {f / a:.0%}" for _, a, f in totals) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=RATES, default="H100", help="whose rates (default H100)")
    options = parser.parse_args(argv)
    print("\n\n".join(format_table(options.device, form) for form in FORMATS))


if __name__ == "__main__":
    main()


__all__ = ["floor", "milliseconds", "phases"]
