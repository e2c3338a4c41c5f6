"""serve: a trained model as a web page and an interface for programs."""
