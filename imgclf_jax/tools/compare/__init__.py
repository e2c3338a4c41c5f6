"""compare: runs side by side, with paired tests over seeds and examples."""
