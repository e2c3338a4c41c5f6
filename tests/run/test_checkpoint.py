"""Checkpoints: damage is reported and an older one used, bit for bit; a full disk loses nothing."""

import json
import logging
import math
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough

from imgclf_jax.core import sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import manifest
from imgclf_jax.run.checkpoint import CheckpointRemoved, Checkpoints


def make_state(step: int) -> dict:
    """Leaves of every kind in a train state, and a bfloat16 one, replicated on all devices."""
    rng = np.random.default_rng(step)
    state = {
        "params": {"kernel": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32), "bias": jnp.zeros(5)},
        "half": jnp.asarray(rng.normal(size=64), jnp.bfloat16),
        "opt": ((jnp.int32(step), jnp.asarray(rng.normal(size=3), jnp.float32)), ()),
        "seed": jnp.uint32(2**32 - 1),
        "flags": jnp.array([True, False]),
    }
    return jax.device_put(state, sharding.replicated(sharding.make_mesh()))


def like(mesh=None) -> dict:
    """The shapes of `make_state`, on all devices or those of `mesh`."""
    whole = sharding.replicated(mesh or sharding.make_mesh())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), make_state(0))


def save(directory: Path, steps: dict[int, dict[str, float]], **options) -> Checkpoints:
    """Records the scores of each step, then saves `make_state(step)`, as a run does."""
    checkpoints = Checkpoints(directory, **options)
    for step, scores in steps.items():
        with (directory.parent / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **scores}) + "\n")
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    return Checkpoints(directory, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory with the checkpoints of steps 10 and 20."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(directory, {10: {}, 20: {}})
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    """A copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a bit in the middle flipped": lambda file: flip(file, file.stat().st_size // 2),
    "removed": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", ["a bit in the middle flipped", *thorough("truncated", "removed")])
def test_damage_to_any_file(saved, tmp_path, caplog, damage):
    """Whichever file is hit, one warning names it, the checkpoint is moved aside, and an older one is used."""
    files = sorted(f.relative_to(saved) for f in (saved / "20").rglob("*") if f.is_file() and f.stat().st_size)
    assert len(files) > 5
    for i, file in enumerate(files):
        if file.name == "manifest.json" and damage == "removed":
            continue  # as where a process was killed before it was written
        directory = tmp_path / str(i) / "checkpoints"
        shutil.copytree(saved, directory)
        DAMAGE[damage](directory / file)
        caplog.clear()
        step, state = Checkpoints(directory).restore_latest(like())
        assert step == 10, file
        assert tree.sha256(state) == tree.sha256(make_state(10))
        (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("imgclf_jax")]
        assert file.name in record.message or file.name == "manifest.json"  # in which another file's name may change
        assert f"checkpoint {directory}/20 is damaged" in record.message
        assert f"moved to {directory.parent}/damaged/20 and the checkpoint of step 10 is used" in record.message
        assert (names(directory), names(directory.parent / "damaged")) == (["10"], ["20"])


def test_reading_alone_moves_nothing(directory, caplog):
    """`evaluate` may read a run that still trains: it uses the older checkpoint and leaves the damaged one in place."""
    DAMAGE["truncated"](directory / "20" / "manifest.json")
    (directory / "30.orbax-checkpoint-tmp").mkdir()
    assert Checkpoints(directory, read_only=True).restore_latest(like())[0] == 10
    assert "the checkpoint of step 10 is used" in caplog.text
    assert names(directory) == ["10", "20", "30.orbax-checkpoint-tmp"]


def test_all_damaged(directory, tmp_path):
    """Then nothing is moved and the user decides; with no checkpoint at all, a run starts."""
    for step in ("10", "20"):
        flip(directory / step / "manifest.json", 0)
    with pytest.raises(UserError, match=r"no checkpoint of \[10, 20\] in .* can be read: .*20 is damaged.* remove or"):
        Checkpoints(directory).restore_latest(like())
    assert names(directory) == ["10", "20"]
    assert Checkpoints(tmp_path / "new").restore_latest(like()) is None


def test_every_kind_of_leaf_on_other_devices(saved):
    for mesh in (sharding.make_mesh(), sharding.make_mesh(jax.devices()[:1])):
        state = Checkpoints(saved, read_only=True).restore(20, like(mesh))
        assert tree.sha256(state) == tree.sha256(make_state(20))
        assert state["half"].dtype == jnp.bfloat16
        assert all(x.sharding.device_set == set(mesh.devices.flat) for x in jax.tree.leaves(state))


def test_another_model(saved):
    other = like()
    other["params"]["kernel"] = jax.ShapeDtypeStruct((7, 6), jnp.float32, sharding=other["seed"].sharding)
    with pytest.raises(UserError, match=r"another model .*params/kernel is float32\[7, 5\] in it, float32\[7, 6\] by"):
        Checkpoints(saved, read_only=True).restore(20, other)


def test_donated_at_once(tmp_path):
    """The next step may donate the state's buffers as soon as `save` returns."""
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones_like(x), s), donate_argnums=0)
    state = jax.device_put({"x": jnp.arange(500_000.0)}, sharding.replicated(sharding.make_mesh()))
    shape = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    expected = {}
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        expected[step] = np.arange(500_000, dtype=np.float32) + np.float32(step - 1)
        checkpoints.save(step, state)
        state = advance(state)
    checkpoints.wait()
    advance(state)
    assert state["x"].is_deleted()  # no save holds them any more
    for step, values in expected.items():
        np.testing.assert_array_equal(checkpoints.restore(step, shape)["x"], values)


@pytest.mark.parametrize(("best", "values", "expected"), [
    ("val/loss", (math.nan, 0.5, -math.inf), 2), ("val/accuracy", (0.5, math.inf, 0.2), 1),
    ("val/accuracy", (0.5, 0.9, 0.9, 0.1), 2), ("val/accuracy", (math.nan, math.nan), None),
    ("max:val/loss", (0.5, 0.9, 0.1), 2), ("min:val/my_error", (0.5, 0.1, 0.9), 2),
])  # fmt: skip
def test_the_best_is_the_first_of_the_finite_values(tmp_path, best, values, expected):
    """It is kept next to the latest checkpoint; without one there is no best."""
    scores = {step: {best.partition(":")[2] or best: value} for step, value in enumerate(values, 1)}
    checkpoints = save(tmp_path / "checkpoints", scores, keep=1, best=best)
    assert checkpoints.best_step() == expected
    assert set(checkpoints.steps()) >= {len(values), *filter(None, [expected])}


def test_a_killed_save(directory, caplog):
    """Its temporary folder is no checkpoint and is cleaned up; one without a manifest gives way to one that has it."""
    shutil.copytree(directory / "20", directory / "30.orbax-checkpoint-tmp")
    (directory / "20" / "manifest.json").unlink()  # killed before it was written
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [10, 20]
    step, state = checkpoints.restore_latest(like())
    assert (step, tree.sha256(state)) == (10, tree.sha256(make_state(10)))
    assert f"checkpoint {directory}/20 cannot be verified" in caplog.text
    assert (names(directory), names(directory.parent / "damaged")) == (["10"], ["20"])


def test_a_reader_beside_the_run(directory):
    """A checkpoint that the run removes while it is read is no damaged one."""
    reader = Checkpoints(directory, read_only=True)
    shutil.rmtree(directory / "20")
    assert reader.restore_latest(like())[0] == 10
    shutil.rmtree(directory / "10")
    with pytest.raises(CheckpointRemoved, match="was removed while it was read, since its run still trains"):
        reader.restore_latest(like())


def test_a_removal_is_never_half_done(directory, tmp_path, monkeypatch):
    """Neither a reader nor, after a kill, the resumed run meets a checkpoint whose files are being removed."""
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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # TensorStore calls a closed event loop
def test_a_full_disk(tmp_path):
    """One sentence, and the last good checkpoint is intact; tests/stress.py fills the disks of whole runs."""
    directory, before = tmp_path / "checkpoints", resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = save(directory, {1: {}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        said = f"could not be saved in {directory}: .*; the last good one is from step 1; free some space or repair"
        with pytest.raises(UserError, match=said):
            checkpoints.save(2, make_state(2)) or checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Checkpoints(directory, read_only=True).restore_latest(like())[0] == 1


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(bytes(3 << 20))
    (tmp_path / "inner" / "b").write_bytes(b"12")
    manifest.write(tmp_path)
    return tmp_path


def test_the_size_and_checksum_of_each_file(folder):
    assert manifest.find_fault(folder) == ""
    whole = json.loads((folder / manifest.NAME).read_text())
    assert whole["inner/b"] == [2, 0x4F5344CD]  # CRC-32 of "12"
    assert whole["a"][0] == 3 << 20


@pytest.mark.parametrize("content", [
    b"", b"{}", b"3", b"[[]]", b"\xff", b'{"a": [true, 1]}', b'{"a": ["1", 2]}', b'{"a": [1]}', b'{"a": {"b": 1e999}}',
    b'{"\\u0000": [1, 1]}', b'{"inner": [1, 1]}', b'{"/dev/zero": [1, 1]}', b"[" * 100_000,
])  # fmt: skip
def test_any_manifest(folder, content):
    (folder / manifest.NAME).write_bytes(content)
    assert manifest.find_fault(folder)
