"""What this project is measured beside: Keras, PyTorch, and a plain linen loop."""
