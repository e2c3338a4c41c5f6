"""export: a trained model for JAX, TensorFlow, ONNX runtimes and PyTorch."""
