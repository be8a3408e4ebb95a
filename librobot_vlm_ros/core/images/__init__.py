"""Images as they come, checked before they are decoded: messages, JPEG, PNG, picture files."""
