"""Where vLLM is, and the moment at which it imports a module: nothing of vLLM is imported before that."""

import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def package_directory() -> Path:
    """Where the installed package ``vllm`` lies, without importing it. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("there is no module named vllm")
    return Path(next(iter(spec.submodule_search_locations)))


def version() -> str:
    """``vllm.__version__``: the truth also for rebuilds whose distribution has another name."""
    import vllm

    return str(vllm.__version__)


def when_imported(module_names: tuple[str, ...], action: Callable[[ModuleType], bool]) -> None:
    """Call ``action(module)`` right after one of the modules is executed, or at once where it already is.

    Nothing is imported for it: a process that never needs the module never pays for it. The watch ends when the
    action answers True. A second call replaces the first.
    """
    stop_watching()
    if not any(action(sys.modules[name]) for name in module_names if name in sys.modules):
        sys.meta_path.insert(0, _ImportWatch(module_names, action))


def stop_watching() -> None:
    """Take back what :func:`when_imported` has done."""
    for finder in [f for f in sys.meta_path if isinstance(f, _ImportWatch)]:
        sys.meta_path.remove(finder)


class _ImportWatch(MetaPathFinder):
    """Lets the other finders find a watched module, and adds a step after its execution."""

    def __init__(self, module_names: tuple[str, ...], action: Callable[[ModuleType], bool]) -> None:
        self.module_names = module_names
        self.action = action
        self._searching = threading.local()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.module_names or self not in sys.meta_path:
            return None
        if vars(self._searching):  # another plugin's watch, which this one asks, asks it in turn
            return None
        self._searching.name = name
        try:
            spec = self._spec_of_others(name, path, target)
        finally:
            del self._searching.name
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithStep(spec.loader, self)
        return spec

    def _spec_of_others(self, name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                return spec
        return None


class _LoaderWithStep(Loader):
    def __init__(self, loader: Loader, watch: _ImportWatch) -> None:
        self.loader = loader
        self.watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.watch.action(module) and self.watch in sys.meta_path:
            sys.meta_path.remove(self.watch)
