"""Where values are kept, in memory and on disk."""
