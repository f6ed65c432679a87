"""Code that runs after somebody imports a module, and does not import it itself."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class AfterImport(MetaPathFinder):
    """On sys.meta_path: calls `function(name)` of a module when one of `names` was imported."""

    def __init__(self, names: Sequence[str], module: str, function: str) -> None:
        self.names, self.module, self.function = set(names), module, function
        sys.meta_path.insert(0, self)
        for name in names:
            if name in sys.modules:
                self.call(name)

    def call(self, name: str) -> None:
        self.names.discard(name)
        getattr(importlib.import_module(self.module), self.function)(name)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.names:
            return None
        self.names.discard(name)  # the other finders find it
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            original = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                original(module)
                self.call(name)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
