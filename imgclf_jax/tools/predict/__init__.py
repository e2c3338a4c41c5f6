"""predict: the classes of new images."""
