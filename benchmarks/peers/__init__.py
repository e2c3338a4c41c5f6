"""The peers that this project is compared with: Keras, PyTorch, and a plain linen loop."""
