"""A bundle: one zip file with what a run has recorded, from which another person can train it again.

It holds no data and no checkpoints. The same contents give the same bytes: members are stored, in one order, with one
time. A bundle may come from anybody: of what it holds only known names are read, and no more than so many bytes.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

from imgclf_jax.core import archive, places
from imgclf_jax.core.errors import UserError, reason

NAMES = ("config.json", "provenance.json", "digests.jsonl", "metrics.jsonl", "result.json", "requirements.txt")
_MOST = dict.fromkeys(NAMES, 32 << 20) | {"digests.jsonl": 128 << 20, "metrics.jsonl": 128 << 20}  # bytes of a member
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip file can hold


def write(file: Path, contents: Mapping[str, bytes]) -> None:
    """Writes the members `contents`, whose names are among NAMES, in one piece."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as packed:
        for name in NAMES:
            if name in contents:
                member = zipfile.ZipInfo(name, _TIME)
                member.create_system, member.external_attr = 3, 0o644 << 16  # alike on all systems
                packed.writestr(member, contents[name])
    try:
        with places.replacing(file) as temporary:
            temporary.write_bytes(buffer.getvalue())
    except OSError as e:
        raise UserError(f"the bundle {file} cannot be written: {reason(e)}; name another file by --bundle") from e


def read(file: Path) -> dict[str, bytes]:
    """The members of a bundle, by name. Raises UserError for a file that is none, is damaged, or holds other members.

    Nothing is written to the disk, and nothing in it is run.
    """
    try:
        with archive.open_checked(file) as packed:
            members = packed.infolist()
            names = [member.filename for member in members]
            if not set(names) <= set(NAMES) or len(names) > len(set(names)) or "config.json" not in names:
                raise zipfile.BadZipFile(f"it holds {str(names[:8])[:200]}, and a bundle holds {', '.join(NAMES)}")
            for member in members:
                if member.file_size > (most := _MOST[member.filename]):
                    raise zipfile.BadZipFile(f"its {member.filename} is longer than {most >> 20} MB; if you trust it, "
                                             "unpack it into a folder and name that")  # fmt: skip
            return {member.filename: archive.read(packed, member).tobytes() for member in members}
    except Exception as e:  # damage raises errors of many types
        raise UserError(f"{file} is no bundle that can be read: {reason(e)}; make one by `reproduce WORKDIR "
                        "--bundle=FILE`") from e  # fmt: skip
