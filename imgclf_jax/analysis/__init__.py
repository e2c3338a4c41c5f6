"""What predictions say of a model: scores, their intervals, and whether one model is better than another."""
