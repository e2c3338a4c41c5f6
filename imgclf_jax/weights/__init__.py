"""Loading weights from other libraries and runs: file formats, names and layouts, and fitting them to a model."""
