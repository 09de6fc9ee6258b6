#!/usr/bin/env python
"""Trains many CLTs on the same tokens, to choose settings by; the same as `hf-clt sweep`. `--help` explains it."""

import sys

from hf_clt.commands.sweep import main


if __name__ == "__main__":
    sys.exit(main())
