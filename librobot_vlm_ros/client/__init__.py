"""The other side of the node: a context and a node of its own, the node as a process."""
