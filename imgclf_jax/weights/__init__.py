"""Weights made elsewhere: files, names, and what fits a model."""
