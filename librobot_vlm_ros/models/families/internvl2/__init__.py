"""InternVL2 (Chen et al., 2024, arXiv:2404.16821)."""
