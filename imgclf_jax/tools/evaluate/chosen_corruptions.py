"""Which corruptions `evaluate --corruptions` computes, and the photographs that one of them needs."""

from pathlib import Path

import numpy as np

from imgclf_jax.core.errors import UserError, unknown
from imgclf_jax.tools.evaluate import corruptions, frost

WITHOUT_FROST = ("frost, the fifteenth, is left out: it lays photographs over the image, which are not part of this. "
                 f"They are in {frost.SOURCE}; with these, add --frost=DIR.")  # fmt: skip


def parse(text: str, folder: str) -> tuple[list[str], tuple[np.ndarray, ...]]:
    """The corruptions that "all", or names between commas, stand for, and the photographs in `folder` for `frost`.

    Without a folder "all" are without `frost`. Raises UserError for another name, for `frost` without a folder, a
    folder without `frost`, and photographs that are missing or broken.
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if text == "all":
        names = [name for name in corruptions.CORRUPTIONS if folder or name != "frost"]
    if not names:
        raise UserError("--corruptions wants all, or names between commas, such as fog,contrast")
    for name in names:
        if name not in corruptions.CORRUPTIONS:
            raise UserError(f"--corruptions: {unknown('corruption', name, ['all', *corruptions.CORRUPTIONS])}")
    if "frost" in names and not folder:
        raise UserError(f"--corruptions: frost lays photographs over the image, which are not part of this: give their "
                        f"folder, --frost=DIR, or leave it out. They are in {frost.SOURCE}")  # fmt: skip
    if folder and "frost" not in names:
        raise UserError("--frost gives photographs that --corruptions does not ask for: add frost to its names, or "
                        "drop --frost")  # fmt: skip
    return names, frost.read(Path(folder)) if folder else ()
