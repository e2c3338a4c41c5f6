"""The command line: commands, flags and config overrides."""
