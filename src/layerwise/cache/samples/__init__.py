"""The samples of a loader, sorted by shape, and what is stored of them."""
