"""Scores of whole evaluation sets from predictions, in NumPy, with confidence intervals."""
