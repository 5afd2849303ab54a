"""A run's own checkpoints: saved, loaded at any layout, held to their checksums, and cut."""
