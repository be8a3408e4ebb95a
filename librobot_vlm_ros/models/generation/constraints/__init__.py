"""Token masks that keep an answer to its notation of boxes."""
