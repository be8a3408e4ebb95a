"""What goes into a model: words as token ids, images as pixels, prompt templates."""
