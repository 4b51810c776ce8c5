"""Names of the logical axes and of the mesh axes."""

# Mesh axes. The config's `context` is split into `ring` (outer) and `ulysses` (inner, nearest neighbours).
DATA, FSDP, RING, ULYSSES, TENSOR = "data", "fsdp", "ring", "ulysses", "tensor"
MESH_AXES = (DATA, FSDP, RING, ULYSSES, TENSOR)
CONTEXT = (RING, ULYSSES)

# Logical axes of activations.
BATCH = "batch"
SEQUENCE = "sequence"  # video tokens, the long axis
HEADS = "heads"
WIDTH = "width"  # image width inside the VAE

# Logical axes of weights (the same names may annotate activations).
EMBED = "embed"  # model dim of a weight: sharded over fsdp
MLP = "mlp"  # feed-forward inner dim: tensor parallel
VOCAB = "vocab"
LAYERS = "layers"  # stacked blocks, never sharded
