"""Codes, lattices, sizes and divergences."""
