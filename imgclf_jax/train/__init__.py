"""Training: the loop, its set-up, exact evaluation, and runs that go on beyond their total."""
