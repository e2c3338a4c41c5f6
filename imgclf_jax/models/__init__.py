"""Backbones, from images to features, and the Classifier that adds the head."""
