"""How good answers are against ground truth."""
