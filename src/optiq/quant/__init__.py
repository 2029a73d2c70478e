"""Measuring, allocating and rounding."""
