"""A bundle: one zip file with the records of a run, from which another person can train it again.

It holds no data and no checkpoints. Equal contents give equal bytes: members are stored in a fixed order with a fixed
time. Since a bundle may come from anybody, only members with known names are read.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError, reason

NAMES = ("config.json", "provenance.json", "digests.jsonl", "metrics.jsonl", "result.json", "requirements.txt")
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest in a zip file


def write(file: Path, contents: Mapping[str, bytes]) -> None:
    """Writes a bundle of `contents`, whose names are among NAMES, atomically."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as packed:
        for name in NAMES:
            if name in contents:
                member = zipfile.ZipInfo(name, _TIME)
                member.create_system, member.external_attr = 3, 0o644 << 16  # the same on all systems
                packed.writestr(member, contents[name])
    try:
        paths.write_atomically(file, buffer.getvalue())
    except OSError as e:
        raise UserError(f"the bundle {file} cannot be written: {reason(e)}; name another file by --bundle") from e


def read(file: Path) -> dict[str, bytes]:
    """Reads the members of a bundle, by name. Raises UserError if the file is damaged or holds other members.

    It writes nothing to disk and runs nothing from the bundle.
    """
    try:
        with paths.open_regular(file) as opened, zipfile.ZipFile(opened) as packed:
            members = packed.infolist()
            names = [member.filename for member in members]
            if not set(names) <= set(NAMES) or len(names) > len(set(names)) or "config.json" not in names:
                raise zipfile.BadZipFile(f"it holds {str(names[:8])[:200]}, but a bundle holds {', '.join(NAMES)}")
            return {member.filename: packed.read(member) for member in members}
    except Exception as e:  # damage raises errors of many types
        raise UserError(f"{file} is not a readable bundle: {reason(e)}; make one by `reproduce WORKDIR "
                        "--bundle=FILE`") from e  # fmt: skip
