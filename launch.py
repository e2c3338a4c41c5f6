"""The command line of a clone: calls `imgclf_jax.cli.main`. Help needs neither JAX nor TensorFlow.

Usage: launch.py [COMMAND] [--config=FILE.py[:ARG]] [--workdir=DIR] [--config.KEY=VALUE …] [FILE|DIR …]
"""

import os
import signal
import sys

if sys.version_info < (3, 12):  # noqa: UP036  before anything is imported that older versions cannot read
    sys.exit(f"error: imgclf_jax needs Python 3.12 or later, and {sys.executable} is {sys.version.split()[0]}; "
             "`uv run launch.py` brings one")  # fmt: skip

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C during the imports: no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # imgclf_jax is the package next to this file, even if the environment or PYTHONPATH names another clone.
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [_here, *(folder for folder in sys.path if folder != _here)]
    import imgclf_jax  # noqa: F401  which itself imports no installed package

    # Now those come first: a jax.py next to this file must not shadow JAX.
    sys.path.append(sys.path.pop(0))

try:
    from imgclf_jax.cli.main import main, run_and_exit
except ModuleNotFoundError as e:
    if __name__ != "__main__" or (e.name or "").startswith("imgclf_jax"):
        raise
    sys.exit(f"error: {sys.executable} has no package {e.name!r}: run `uv run launch.py`, which makes an environment "
             "with all of them, or activate yours")  # fmt: skip

__all__ = ["main"]

if __name__ == "__main__":
    run_and_exit("launch.py", [sys.executable, os.path.abspath(__file__)])
