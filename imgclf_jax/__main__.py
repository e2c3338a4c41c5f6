"""`python -m imgclf_jax`: the command line of the installed package."""

import sys

if not sys.flags.safe_path:  # `-m` puts the working directory first, where a stranger's jax.py may be
    del sys.path[0]

from imgclf_jax.cli.main import console

if __name__ == "__main__":
    console()
