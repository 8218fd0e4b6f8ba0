"""Slides and tile folders -> WebDataset tars. Never imports torch: it runs on a CPU node."""
