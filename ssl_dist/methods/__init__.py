"""One file a method; the folder listing is the list of methods.

A method's file exposes `Config` (a dataclass) and `Method` (see base.py). Its name is its name in a config.
"""

import importlib
from types import ModuleType


def load(name: str) -> ModuleType:
    """The module of a method. A method whose own import is broken shows that error, not "unknown"."""
    return importlib.import_module(f"{__name__}.{name}")
