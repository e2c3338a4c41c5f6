"""What a run leaves behind: work directory, checkpoints, provenance, logs, caches."""
