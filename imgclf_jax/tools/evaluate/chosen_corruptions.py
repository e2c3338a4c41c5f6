"""Parses `evaluate --corruptions` and reads the photographs that `frost` needs."""

from pathlib import Path

import numpy as np

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.tools.evaluate import corruptions, frost

WITHOUT_FROST = ("The fifteenth corruption, frost, is missing: it overlays photographs that imgclf_jax does not ship. "
                 f"Download {frost.SOURCE} and add --frost=DIR.")  # fmt: skip


def parse(text: str, folder: str) -> tuple[list[str], tuple[np.ndarray, ...]]:
    """Returns the corruptions named by `text`, comma-separated names or "all", and the photographs in `folder`.

    "all" includes `frost` only with a folder. Raises UserError for an unknown name, for `frost` without a folder or a
    folder without `frost`, and for missing or broken photographs.
    """
    every = [name for name in corruptions.CORRUPTIONS if folder or name != "frost"]
    words = [word.strip() for word in text.split(",") if word.strip()]
    names = list(dict.fromkeys(name for word in words for name in (every if word == "all" else [word])))
    if not names:
        raise UserError("--corruptions must be 'all', or names separated by commas, such as fog,contrast")
    for name in names:
        if name not in corruptions.CORRUPTIONS:
            raise UserError(f"--corruptions: {unknown('corruption', name, ['all', *corruptions.CORRUPTIONS])}")
    if "frost" in names and not folder:
        raise UserError("--corruptions: frost overlays photographs that imgclf_jax does not ship: download "
                        f"{frost.SOURCE} and add --frost=DIR, or drop frost")  # fmt: skip
    if folder and "frost" not in names:
        raise UserError("--frost names photographs, but --corruptions lacks frost: add it, or drop --frost")
    return names, frost.read(Path(folder)) if folder else ()
