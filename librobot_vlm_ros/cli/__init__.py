"""The `librobot-vlm` command: one file per subcommand; nothing heavy is imported before it runs."""
