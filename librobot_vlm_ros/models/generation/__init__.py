"""Generation: from a prefilled prompt to tokens with their probabilities."""
