"""Device ops: augmentation inside the compiled step, mixing, and views at test time."""
