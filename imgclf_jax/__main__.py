"""`python -m imgclf_jax`: the command line of the installed package."""

from imgclf_jax.cli.main import console

if __name__ == "__main__":
    console()
