"""Images from disk to device: sources, host ops, the pure stream, device ops."""
