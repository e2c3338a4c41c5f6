"""serve: a trained model as a web page and an HTTP API."""
