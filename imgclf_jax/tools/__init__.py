"""What is done with a trained model: a folder for each tool, with its command, its computation and its page."""
