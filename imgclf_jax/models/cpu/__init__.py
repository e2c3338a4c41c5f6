"""The CPU form of the layers: matmuls on feature-first arrays, and the program rewrite that cancels transposes."""
