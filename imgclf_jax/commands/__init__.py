"""One file a command: train, evaluate, predict."""
