#!/usr/bin/env python
"""Converts CLTs of several trainers; the same as `hf-clt convert`. `--help` explains it."""

import sys

from hf_clt.commands.convert import main


if __name__ == "__main__":
    sys.exit(main())
