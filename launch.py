"""The command line of a clone: calls `imgclf_jax.cli.main`. Help needs neither JAX nor TensorFlow.

Usage: launch.py [COMMAND] [--config=FILE.py[:ARG]] [--workdir=DIR] [--config.KEY=VALUE …] [FILE|DIR …]
"""

import importlib.util
import os
import sys

if __name__ == "__main__":
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

from imgclf_jax.cli.main import main, run_and_exit

__all__ = ["main"]

if __name__ == "__main__":
    run_and_exit("launch.py", [sys.executable, os.path.abspath(__file__)])
