"""Chips that are not here: what they can do, their compilers, and what a compiled program would need of them."""
