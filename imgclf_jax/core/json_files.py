"""JSON files, written atomically."""

import json
from pathlib import Path

from imgclf_jax.core import paths
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Json, JsonObject


def as_object(value: Json) -> JsonObject:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def read(path: Path) -> JsonObject:
    """Reads a JSON object; {} if the file holds another value. Raises UserError if it is missing or not JSON."""
    try:
        return as_object(json.loads(paths.read(path)))
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged: it is not JSON") from e


def write(path: Path, value: Json) -> None:
    """Writes indented JSON atomically."""
    paths.write_atomically(path, json.dumps(value, indent=2) + "\n")
