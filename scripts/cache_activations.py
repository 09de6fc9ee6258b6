#!/usr/bin/env python
"""Harvests a language model's activations to disk; the same as `hf-clt cache`. `--help` explains it."""

import sys

from hf_clt.commands.cache import main


if __name__ == "__main__":
    sys.exit(main())
