"""Figures of devices and of their links, and names of slices. Imports no jax."""
