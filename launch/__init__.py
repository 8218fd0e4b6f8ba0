"""Command lines for machines. Imports none of ours and never torch."""
