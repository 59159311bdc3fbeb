"""``hamts.probes`` is the package ``probes``: both names import it, and each of its modules once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

ALIAS = __name__ + "."


class _SameModules(MetaPathFinder, Loader):
    """``hamts.probes.api`` is ``probes.api``: loaded under two names it would register every suite twice."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        own = fullname.removeprefix(ALIAS)
        return ModuleSpec(fullname, self) if own != fullname and find_spec(f"probes.{own}") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module("probes." + spec.name.removeprefix(ALIAS))
        # the import system is about to put the alias in the place of the module's own
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _SameModules())
sys.modules[__name__] = import_module("probes")
