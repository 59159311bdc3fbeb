"""``hamts.probes`` is the package ``probes``: both names import it."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("probes")
