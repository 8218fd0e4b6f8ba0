"""Distributed self-supervised pretraining on histology, from whole slides to result tables."""

__version__ = "0.1.0"
