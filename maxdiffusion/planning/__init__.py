"""What a run would need and how long it would take, from compiled programs; nothing here is executed on a TPU."""
