"""One way of rounding per file."""
