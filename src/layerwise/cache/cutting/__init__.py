"""Where a forward pass can be cut."""
