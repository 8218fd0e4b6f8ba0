"""Distributed self-supervised pretraining on histology, from whole slides to result tables."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_dist.notebook import Run as Run

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`from ssl_dist import Run`, for which nothing is imported by those who do not ask for it."""
    if name == "Run":
        from ssl_dist.notebook import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
