"""The command line: which commands there are, their flags, and the words that override a config."""
