#!/usr/bin/env python
"""Measures a CLT on held-out text; the same as `hf-clt evaluate`. `--help` explains it."""

import sys

from hf_clt.commands.evaluate import main


if __name__ == "__main__":
    sys.exit(main())
