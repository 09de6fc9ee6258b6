#!/usr/bin/env python
"""Pushes a finished CLT to the Hub; the same as `hf-clt push`. `--help` explains it."""

import sys

from hf_clt.commands.push import main


if __name__ == "__main__":
    sys.exit(main())
