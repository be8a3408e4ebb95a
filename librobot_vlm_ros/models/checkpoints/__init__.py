"""Checkpoints: found, checked, read, converted."""
