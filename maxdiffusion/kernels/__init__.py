"""The package's Pallas kernels."""
