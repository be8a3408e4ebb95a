"""What is kept of a frame between requests: pixels, vision features, prefix keys and values."""
