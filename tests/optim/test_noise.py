"""Optimizers that add noise: it follows from the run's seed, and their keys are saved with the state."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import launch
from imgclf_jax.optim import optimizers
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.trained import restore

PARAMS = {"a": jnp.zeros((200, 50)), "b": jnp.zeros(1000)}


def moves(text, seed, steps=2):
    """The updates of a few steps with zero gradients, which are the noise."""
    optimizer = optimizers.build(text, optax.constant_schedule(0.1), 0.0)
    state, out = optimizers.seed_keys(optimizer.init(PARAMS), jnp.uint32(seed)), []
    for _ in range(steps):
        updates, state = optimizer.update(PARAMS, state, PARAMS)
        out.append(jax.device_get(updates))
    return out


@pytest.mark.parametrize("text", ["optax:noisy_sgd(key=3)", "optax:add_noise(eta=0.01, gamma=0.55, key=0)|sgd"])
def test_the_noise_is_that_of_the_seed(text):
    """Standard deviation rate * sqrt(eta / step**gamma) (Neelakantan et al. 2015, arXiv:1511.06807, section 3)."""
    first, again, other = (moves(text, seed) for seed in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for step, (ours, theirs) in enumerate(zip(first, other, strict=True), 1):
        assert np.std(ours["a"]) == pytest.approx(0.1 * np.sqrt(0.01 / step**0.55), rel=5 * np.sqrt(0.5 / 10_000))
        assert abs(np.corrcoef(ours["a"].ravel(), theirs["a"].ravel())[0, 1]) < 5 / np.sqrt(10_000)


def test_two_noises_differ():
    """Those of two transforms, and those of two keys in a spec."""
    both = moves("optax:add_noise(eta=0.01, gamma=0.55, key=0)|optax:add_noise(eta=0.01, gamma=0.55, key=0)|sgd", 5)
    assert np.std(both[0]["a"]) == pytest.approx(0.01 * np.sqrt(2), rel=0.05)  # 0.02 if they were the same
    assert not np.array_equal(moves("optax:noisy_sgd(key=1)", 5)[0]["a"], moves("optax:noisy_sgd(key=2)", 5)[0]["a"])


@pytest.mark.thorough
def test_a_run_resumes(tmp_path):
    """Two seeds at once, each with its own noise; resumed in the middle, the same bits."""
    argv = [f"--workdir={tmp_path}", "--config.data.source=fake(64, (8, 8, 1), 4)", "--config.preprocess=decode(1)",
            "--config.model=mlp(widths=(4,))", "--config.total=6 steps", "--config.batch_size=16",
            "--config.num_seeds=2", "--config.optimizer=optax:noisy_sgd(key=0)", "--config.checkpoint_every=3 steps",
            "--config.tensorboard=False", "--config.schedule=constant(1e-2)"]  # fmt: skip
    assert launch.main(argv) == 0
    workdir = Workdir(tmp_path)
    expected = json.loads(workdir.result.read_text())
    programs = restore(workdir.load_config(), workdir, "3").programs
    state = Checkpoints(workdir.checkpoints, read_only=True).restore(3, programs.shape)["state"]
    keys = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    assert [key.shape for key in keys] == [(2,)]
    assert len(np.unique(jax.random.key_data(keys[0]), axis=0)) == 2
    shutil.rmtree(workdir.checkpoints / "6")
    workdir.result.unlink()
    assert launch.main(argv) == 0
    assert json.loads(workdir.result.read_text())["params_sha256"] == expected["params_sha256"]
