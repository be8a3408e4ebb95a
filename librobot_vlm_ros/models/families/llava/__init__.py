"""LLaVA-1.5 (Liu et al., 2023, arXiv:2310.03744)."""
