"""Runs on one page; as a function it is `repro.interface.report`, since both have this name."""

import sys
from importlib import import_module
from types import ModuleType


class _Callable(ModuleType):
    def __call__(self, *runs: object, **settings: object) -> object:
        return import_module("repro.interface").report(*runs, **settings)


sys.modules[__name__].__class__ = _Callable
