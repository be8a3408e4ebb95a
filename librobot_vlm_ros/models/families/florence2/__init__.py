"""Florence-2 (Xiao et al., 2023, arXiv:2311.06242)."""
