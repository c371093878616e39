"""The namespace in which this package registers its operators."""

from __future__ import annotations

import re

# A second copy of the package (the Hub's `kernels` library loads one under a name of its own, an application may vendor
# one) would take over the operators of the first, if it registered them under the same names.
NAMESPACE = "tlstm" if __package__ == "tlstm_kernels" else re.sub(r"\W", "_", str(__package__))
