#!/usr/bin/env python
"""Makes a calibrated jumprelu CLT out of a topk CLT; the same as `hf-clt jumprelu`. `--help` explains it."""

import sys

from hf_clt.commands.jumprelu import main


if __name__ == "__main__":
    sys.exit(main())
