"""Qwen2-VL (arXiv:2409.12191) and Qwen3-VL (arXiv:2511.21631)."""
