"""A sweep of a page, of which the tests train the first run alone."""

import contextlib
import io
import shlex
from pathlib import Path

import launch


def first_run(words: list[str]) -> list[str]:
    """The command line of the first run of a sweep, `words`, as a page would have it: without what makes it long."""
    words, out = words[: words.index(">")] if ">" in words else words, io.StringIO()
    with contextlib.redirect_stdout(out):
        assert launch.main(["sweep", *words, *([] if "--print" in words else ["--print"])]) == 0
    _, script, *command = shlex.split(out.getvalue().splitlines()[0])
    assert script.endswith("launch.py")
    config = next(word.removeprefix("--config=") for word in command if word.startswith("--config="))
    named = ["--config", f"configs/{Path(config).name}"] if "configs/" in config else [f"--config={config}"]
    return [word for word in command if not word.startswith(("--config=", "--config.total="))] + named
