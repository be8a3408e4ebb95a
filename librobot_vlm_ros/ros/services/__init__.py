"""What the node answers: services and the action."""
