"""What devices and the links between them can do: figures, names of slices. Imports no jax."""
