"""Checkpoints: find, check, read and convert them."""
