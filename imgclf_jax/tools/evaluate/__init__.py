"""evaluate: scores by class, accuracy on corrupted images, files of predictions. Other tools build on it."""
