"""Decode steps and a vision tower as plain arithmetic on the modules' own weights."""
