"""What the node takes in: camera topics, the instruction."""
