"""The fast path: static caches and decode steps as plain arithmetic, replayed as CUDA graphs."""
