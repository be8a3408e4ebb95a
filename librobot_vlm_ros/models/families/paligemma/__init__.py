"""PaliGemma (Beyer et al., 2024, arXiv:2407.07726)."""
