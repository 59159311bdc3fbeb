"""``hamts.probes`` is the package ``probes``: both names import it."""

import sys

import probes

sys.modules[__name__] = probes
