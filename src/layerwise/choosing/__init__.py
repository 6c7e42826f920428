"""Which plan: shift, transferability, advice, search."""
