"""What a run writes: work directory, checkpoints, provenance, logs, caches."""
