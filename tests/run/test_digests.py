"""digests.jsonl: the digests of parameters, the steps that have one, and the lines after a stop."""

import hashlib
import json
import os
import signal
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imgclf_jax.core.errors import UserError
from imgclf_jax.run import writers
from imgclf_jax.run.digests import Digests, check, find_changed_metrics
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import loop as train

pytestmark = pytest.mark.usefixtures("one_device")


def lines(folder: Path) -> dict[int, dict]:
    """The line of each step."""
    found = [json.loads(line) for line in (folder / "digests.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == sorted({line["step"] for line in found})
    return {line["step"]: line for line in found}


def params() -> dict:
    return {"b": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "a": {"c": jnp.ones(4, jnp.bfloat16)}}


def test_a_line(tmp_path):
    """By the definition: paths in order, dtypes, shapes and bytes; the buffers may be donated right away."""
    metrics = [{"step": 2, "train/loss": 0.5, "train/images_per_second": 9.0}, {"step": 3, "train/loss": 0.25}]
    digests, tree = Digests(tmp_path, 0, 5, metrics=writers.RecordsDigest(metrics)), params()
    digests.record(3, tree)
    jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)(tree)
    b = np.arange(6, dtype="<f4").reshape(2, 3)
    parts = [("a/c", b"a/c\0bfloat16\0(4,)\0" + b"\x80\x3f" * 4), ("b", b"b\0<f4\0(2, 3)\0" + b.tobytes())]
    assert digests.sha256() == hashlib.sha256(b"".join(part for _, part in parts)).hexdigest()
    digests.close()
    each = {name: f"{zlib.crc32(part):08x}" for name, part in parts}
    before = hashlib.sha256(b'{"step": 2, "train/loss": 0.5}\n').hexdigest()
    assert lines(tmp_path) == {
        3: {"step": 3, "params_sha256": digests.sha256(), "metrics_sha256": before, "params": each}
    }


@pytest.mark.parametrize(("last", "edges"), [(1, {1}), (12, {1, 2, 4, 8, 12}), (16, {1, 2, 4, 8, 16})])
def test_the_steps_that_are_recorded(tmp_path, last, edges):
    """Powers of two and the last step, so the first differing step is known up to a factor of two."""
    digests = Digests(tmp_path, 0, last)
    digests.close()
    assert set(digests.edges) == edges


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_told_of_at_the_next_line(tmp_path):
    digests = Digests(tmp_path, 0, 9)
    digests._file.close()
    with Path("/dev/full").open("w") as digests._file._file:
        digests.record(1, params())
        with pytest.raises(UserError, match=r"digests.jsonl could not be written: no space left on device; free some"):
            digests.record(2, params())
        digests.close()


@pytest.mark.thorough
def test_a_run_that_was_stopped_has_the_lines_of_one_that_was_not(fake_config, tmp_path, monkeypatch):
    """For two seeds: at checkpoints, at powers of two and at the end, whose digest is that of the result."""
    fake_config.num_seeds, fake_config.checkpoint.keep = 2, 1
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train.main(fake_config, Workdir(whole)) == 0
    assert set(lines(whole)) == {0, 1, 2, 4, 8, 12}
    assert lines(whole)[12]["params_sha256"] == json.loads((whole / "result.json").read_text())["params_sha256"]
    assert len({line["params_sha256"] for line in lines(whole).values()}) == 6
    original = writers.MetricsWriter.write_scalars

    def and_a_signal(*args):
        original(*args)
        monkeypatch.setattr(writers.MetricsWriter, "write_scalars", original)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(writers.MetricsWriter, "write_scalars", and_a_signal)
    assert train.main(fake_config, Workdir(stopped)) == 75
    assert set(lines(stopped)) == {0, 1, 2, 4, 6}  # 6 is where it stopped
    assert train.main(fake_config, Workdir(stopped)) == 0
    found = lines(stopped)
    del found[6]
    assert found == lines(whole)


def test_a_checkpoint_without_a_line(tmp_path, caplog):
    """A run writes a line for each checkpoint; without it, a resumed run took another run's in silence."""
    digests = Digests(tmp_path, 0, 8)
    for step in (0, 2):
        digests.record(step, params())
    digests.close()
    check(Workdir(tmp_path), 2, params())
    assert not caplog.records
    check(Workdir(tmp_path), 4, params())
    assert f"{tmp_path}/digests.jsonl has no line for step 4, so it is not known whether" in caplog.text
    (tmp_path / "result.json").write_text(json.dumps({"step": 4, "params_sha256": digests.sha256()}))
    caplog.clear()
    check(Workdir(tmp_path), 4, params())
    (tmp_path / "digests.jsonl").unlink()  # of an earlier version
    check(Workdir(tmp_path), 6, params())
    assert not caplog.records


def test_metrics_that_are_not_the_runs(tmp_path):
    """Every record before the last line counts; speeds do not, nor does a file that was removed."""
    metrics, written = [{"step": step, "train/loss": 1 / step} for step in range(1, 9)], writers.RecordsDigest()
    digests = Digests(tmp_path, 0, 8, metrics=written)
    for record in metrics:
        if record["step"] in (2, 4, 8):
            digests.record(record["step"], params())
        written.add(record | {"train/images_per_second": 7.0})
        if record["step"] == 6:
            digests.record(6, params())
    digests.close()
    known = [*lines(tmp_path).values()]
    assert [line["step"] for line in known] == [2, 4, 6, 8]
    assert find_changed_metrics(known, metrics, 8) == ""
    assert find_changed_metrics(known, metrics[:4], 4) == ""  # read while the run went on
    assert find_changed_metrics(known, [], 8) == ""
    assert find_changed_metrics([{"step": 4}], metrics[1:], 8) == ""  # of an earlier version
    for changed, where in (
        ([*metrics[:4], {"step": 5, "train/loss": 0.21}, *metrics[5:]], "from step 4 to 6"),
        ([{"step": 1, "train/loss": 9.0}, *metrics[1:]], "from step 0 to 2"),
        ([*metrics[:2], *metrics[3:]], "from step 2 to 4"),
        ([*metrics[:7], {"step": 7, "test/accuracy": 1.0}, metrics[7]], "from step 6 to 8"),
    ):
        assert f"metrics.jsonl has other records {where} than" in find_changed_metrics(known, changed, 8)
    resumed = Digests(tmp_path, 6, 8, metrics=writers.RecordsDigest())
    resumed.record(6, params())
    resumed.close()
    assert find_changed_metrics(lines(tmp_path).values(), metrics[6:], 8) == ""
