"""What the node says about itself: diagnostics, log, duplicate nodes."""
