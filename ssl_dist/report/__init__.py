"""Run folders -> one HTML page; reads files only, and nothing else in the project knows it."""
