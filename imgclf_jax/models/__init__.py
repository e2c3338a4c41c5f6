"""Backbones that map images to features, and the Classifier that adds a head."""
