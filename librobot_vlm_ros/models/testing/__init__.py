"""Tiny checkpoints of every family and reference arithmetic to compare with."""
