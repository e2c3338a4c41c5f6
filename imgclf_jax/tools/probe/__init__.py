"""features and probe: what a backbone makes of images, and how good its features are."""
