"""The `librobot-vlm` command: a file a subcommand, nothing heavy imported before one runs."""
