"""One folder a model family, and what families share."""
