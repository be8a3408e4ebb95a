"""Parameters: declared once, validated before applied; launch arguments made from them."""
