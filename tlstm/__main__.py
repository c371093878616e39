"""`python -m tlstm` is `tlstm`."""

from __future__ import annotations

import sys

from tlstm.cli import main

if __name__ == "__main__":
    sys.exit(main())
