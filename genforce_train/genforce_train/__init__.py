"""Data sets, marker-to-marker and force models, evaluation and export."""
