"""What is missing on this machine for a model, and the fix."""
