#!/usr/bin/env python
"""Says what training a CLT needs; the same as `hf-clt estimate`. `--help` explains it."""

import sys

from hf_clt.commands.estimate import main


if __name__ == "__main__":
    sys.exit(main())
