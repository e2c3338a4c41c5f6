"""How layers compute on CPU."""
