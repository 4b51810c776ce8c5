"""What a run would need, known before it is made. Imported only where a run is planned."""
