"""explain: where in an image a class is found. Other tools build on it."""
