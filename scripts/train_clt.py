#!/usr/bin/env python
"""Trains a cross-layer transcoder; the same as `hf-clt train`. `--help` explains it."""

import sys

from hf_clt.commands.train import main


if __name__ == "__main__":
    sys.exit(main())
