"""Fidelity and speed of a model directory."""
