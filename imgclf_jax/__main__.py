"""`python -m imgclf_jax`: the command line of the installed package."""

import signal
import sys

if not sys.flags.safe_path:  # `-m` puts the working directory first, where a stranger's jax.py may be
    del sys.path[0]
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C during the imports: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from imgclf_jax.cli.main import console

if __name__ == "__main__":
    console()
