"""report: a page on a trained run."""
