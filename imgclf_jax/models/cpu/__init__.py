"""The forms of the layers on CPU: oneDNN's convolutions, and matmuls on feature-first arrays."""
