"""
Prints the largest difference between rows of attribution graphs and autograd, by architecture, hooks and skip
connection: `python -m tests.attribution.table`. Float64; relative to the largest edge of each row.
"""

from tests.attribution.autograd_reference import ARCHITECTURES
from tests.attribution.cases import HOOKS, autograd, make_case


def main() -> None:
    columns = [(hooks, skip) for hooks in HOOKS for skip in (False, True)]
    heads = [f"`{read}`, `{write}`{', skip' if skip else ''}" for (read, write), skip in columns]
    print("| architecture | " + " | ".join(heads) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in ARCHITECTURES:
        found = [autograd(make_case(name, hooks, skip)) for hooks, skip in columns]
        print(f"| {name} | " + " | ".join(f"{value:.0e}" for value in found) + " |")


if __name__ == "__main__":
    main()
