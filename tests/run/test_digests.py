"""digests.jsonl: the digests of parameters; tests/test_resume.py says which steps have one."""

import hashlib
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax.run.digests import Digests, check
from imgclf_jax.run.workdir import Workdir


def lines(folder: Path) -> dict[int, dict]:
    """The line of each step."""
    found = [json.loads(line) for line in (folder / "digests.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == sorted({line["step"] for line in found})
    return {line["step"]: line for line in found}


def params() -> dict:
    return {"b": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "a": {"c": jnp.ones(4, jnp.bfloat16)}}


def test_a_line(tmp_path):
    """By the definition: paths in order, dtypes, shapes and bytes; the buffers may be donated right away."""
    digests, tree = Digests(tmp_path, 0, 5), params()
    digests.record(3, tree)
    jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)(tree)
    b = np.arange(6, dtype="<f4").reshape(2, 3)
    parts = [("a/c", b"a/c\0bfloat16\0(4,)\0" + b"\x80\x3f" * 4), ("b", b"b\0<f4\0(2, 3)\0" + b.tobytes())]
    assert digests.sha256() == hashlib.sha256(b"".join(part for _, part in parts)).hexdigest()
    digests.close()
    each = {name: f"{zlib.crc32(part):08x}" for name, part in parts}
    assert lines(tmp_path) == {3: {"step": 3, "params_sha256": digests.sha256(), "params": each}}


def test_resuming_drops_what_comes_after(tmp_path, caplog):
    """The line of the step itself is written again, for the restored parameters."""
    digests = Digests(tmp_path, 0, 9)
    for step in (0, 4, 8):
        digests.record(step, params())
        digests.record(step, {"other": jnp.zeros(1)})  # each step has one line
    digests.close()
    with (tmp_path / "digests.jsonl").open("a") as file:
        file.write('{"step": 9, "par')
    again = Digests(tmp_path, 4, 9)
    again.record(4, params())
    again.close()
    assert set(lines(tmp_path)) == {0, 4}
    assert [r.message for r in caplog.records] == [f"{tmp_path}/digests.jsonl: skipped a truncated line"]


def test_a_checkpoint_without_a_line(tmp_path, caplog):
    digests = Digests(tmp_path, 0, 8)
    digests.record(2, params())
    digests.close()
    check(Workdir(tmp_path), 2, params())
    assert not caplog.records
    check(Workdir(tmp_path), 4, params())
    assert f"{tmp_path}/digests.jsonl has no line for step 4, so it is not known whether" in caplog.text
