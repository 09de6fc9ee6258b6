#!/usr/bin/env python
"""Makes pages that show what the features of a CLT are; the same as `hf-clt features`. `--help` explains it."""

import sys

from hf_clt.commands.features import main


if __name__ == "__main__":
    sys.exit(main())
