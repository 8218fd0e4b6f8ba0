"""What an encoder is worth: one protocol a file. Loads only an exported encoder, never a run."""
