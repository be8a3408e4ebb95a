"""Recorded bags back into topics."""
