"""The command line of a clone: calls `imgclf_jax.cli.main`. Help needs neither JAX nor TensorFlow.

Usage: launch.py [COMMAND] [--config=FILE.py[:ARG]] [--workdir=DIR] [--config.KEY=VALUE …] [FILE|DIR …]
"""

import importlib.util
import os
import signal
import sys

if sys.version_info < (3, 12):  # noqa: UP036  before anything is imported that older versions cannot read
    sys.exit(f"error: imgclf_jax needs Python 3.12 or later, and {sys.executable} is {sys.version.split()[0]}; "
             "`uv run launch.py` brings one")  # fmt: skip

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C during the imports: no traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Installed packages come first: a jax.py next to this file must not shadow JAX.
    _here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if folder != _here] + [_here]
    # But imgclf_jax is the package next to this file, even if the environment or PYTHONPATH names another clone.
    _package = os.path.join(_here, "imgclf_jax", "__init__.py")
    _spec = importlib.util.spec_from_file_location(
        "imgclf_jax", _package, submodule_search_locations=[os.path.dirname(_package)]
    )
    if os.path.isfile(_package) and _spec and _spec.loader:
        sys.modules["imgclf_jax"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["imgclf_jax"])

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
