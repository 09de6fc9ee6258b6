"""`python -m hf_clt COMMAND ...` is `hf-clt COMMAND ...`, in the form that `accelerate launch -m` starts."""

import sys

from .commands import main


if __name__ == "__main__":
    sys.exit(main())
