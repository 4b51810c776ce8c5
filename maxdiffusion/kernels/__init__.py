"""Pallas kernels of our own."""
