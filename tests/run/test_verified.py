"""Checkpoints that can be verified go before those that cannot; a save ends once what it wrote is read back."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoint import like, make_state, names, save, saved, score  # noqa: F401  a fixture

from imgclf_jax.core import tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.run.checkpoint import CheckpointRemoved, Checkpoints


def test_a_killed_save(saved, tmp_path, caplog):
    """Its temporary folder is no checkpoint and is cleaned up; one without a manifest gives way to one that has it."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    shutil.copytree(saved / "20", directory / "30.orbax-checkpoint-tmp")
    (directory / "20" / "manifest.json").unlink()  # killed before it was written
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [10, 20]
    step, state = checkpoints.restore_latest(like())
    assert (step, tree.sha256(state)) == (10, tree.sha256(make_state(10)))
    assert f"checkpoint {directory}/20 cannot be verified" in caplog.text
    assert (names(directory), names(directory.parent / "damaged")) == (["10"], ["20"])


def test_without_any_manifest(saved, tmp_path, caplog):
    """The latest is used, and it is said that nobody can tell whether it is whole."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for step in ("10", "20"):
        (directory / step / "manifest.json").unlink()
    assert Checkpoints(directory).restore_latest(like())[0] == 20
    assert f"checkpoint {directory}/20 is used without verification: it has no manifest.json" in caplog.text
    assert names(directory) == ["10", "20"]


@pytest.mark.parametrize("name", ["lr=[0.1]", "a*b?", r"a\n", "\udcff"])
def test_names_that_orbax_takes_for_patterns_are_refused(tmp_path, name):
    """It would find no checkpoint there, or those of another directory; TensorStore refuses a backslash."""
    with pytest.raises(UserError, match=r"has one of \*, \?, \[ and .*; pass another --workdir"):
        Checkpoints(tmp_path / name / "checkpoints")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("best", ["", "test/accuracy"])
def test_what_cannot_be_read_back_is_no_checkpoint(tmp_path, monkeypatch, best):
    """As where a library wrote to another place than it reads from. The earlier ones, and the best, stay."""
    directory = tmp_path / "checkpoints"
    kept = save(directory, {2: {"test/accuracy": 0.7}, 4: {"test/accuracy": 0.5}}, keep=1, best=best).steps()
    assert kept == ([2, 4] if best else [4])
    checkpoints = Checkpoints(directory, keep=1, best=best)
    monkeypatch.setattr(checkpoints._manager, "item_metadata", lambda step: {"params": {}})
    score(directory, 5, {"test/accuracy": 0.9})
    checkpoints.save(5, make_state(5))
    with pytest.raises(UserError, match=r"the checkpoint cannot be read back: .* is absent in it, .* from step 4; "):
        checkpoints.wait()
    assert not (directory / "5" / "manifest.json").exists()
    assert Checkpoints(directory, keep=1).restore_latest(like())[0] == 4
    assert names(directory) == [str(step) for step in kept]


def test_a_reader_beside_the_run(saved, tmp_path):
    """A checkpoint that the run removes while it is read is no damaged one."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    reader = Checkpoints(directory, read_only=True)
    shutil.rmtree(directory / "20")
    assert reader.restore_latest(like())[0] == 10
    shutil.rmtree(directory / "10")
    with pytest.raises(CheckpointRemoved, match="was removed while it was read, since its run still trains"):
        reader.restore_latest(like())


def test_a_removal_is_never_half_done(saved, tmp_path, monkeypatch):
    """Neither a reader nor, after a kill, the resumed run meets a checkpoint whose files are being removed."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    reader = Checkpoints(directory, read_only=True)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda folder, **_: (Path(folder) / "manifest.json").unlink())
        checkpoints = Checkpoints(directory, keep=1)
        checkpoints.save(30, make_state(30))
        checkpoints.close()
    with pytest.raises(CheckpointRemoved):
        reader.restore(20, like())
    assert Checkpoints(directory).restore_latest(like())[0] == 30
    assert (names(directory), (tmp_path / "damaged").exists()) == (["30"], False)


def test_scores_that_are_lost(tmp_path):
    """Without metrics.jsonl there is no best checkpoint; a damaged line takes the score of its step alone."""
    directory, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    scores = {step: {"test/accuracy": value} for step, value in ((10, 0.5), (20, 0.9), (30, 0.7))}
    save(directory, scores, best="test/accuracy", keep=3)
    metrics.write_text(metrics.read_text().replace("0.9", '"x"'))
    assert Checkpoints(directory, best="test/accuracy", read_only=True).best_step() == 30
    metrics.unlink()
    assert Checkpoints(directory, best="test/accuracy", read_only=True).best_step() is None


SAVES = """
import gc, pathlib, sys
import jax.numpy as jnp
from imgclf_jax.run.checkpoint import Checkpoints

checkpoints, arrays, saves = Checkpoints(pathlib.Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
state = {f"{i}": jnp.ones(3) for i in range(arrays)}
for first in range(0, 5 * saves, saves):
    for step in range(first, first + saves):
        checkpoints.save(step, state)
    checkpoints.wait()
    gc.collect()
    print(sys.getallocatedblocks())
"""


@pytest.mark.thorough
def test_a_save_leaks_no_more_than_docs_reliability_says(tmp_path):
    """TensorStore never frees the JSON that Orbax asks it for: some 400 Python objects a save of 40 arrays, 20 kB.

    Measured in a process of its own, where no other test's threads allocate; the first ten saves fill caches.
    """
    arrays, saves = 40, 10
    words = [sys.executable, "-c", SAVES, str(tmp_path), str(arrays), str(saves)]
    out = subprocess.run(words, capture_output=True, text=True, check=True)
    counts = [int(line) for line in out.stdout.split()]
    leaked = [b - a for a, b in itertools.pairwise(counts)]
    assert len(leaked) == 4
    assert max(leaked) < 15 * arrays * saves
