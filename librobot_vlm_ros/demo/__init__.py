"""The node, a model and a bag, from start to report."""
