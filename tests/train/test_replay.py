"""Silent data corruption: a step that is computed twice finds it, on one device and on many, and raises no alarm."""

import functools
import json
from collections import Counter
from types import SimpleNamespace

import faulty_net
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import thorough
from faults import flip
from test_bad_steps import POISON, outcome, poisoned, step_of  # noqa: F401  a fixture

from imgclf_jax import bad_steps
from imgclf_jax.core import sharding
from imgclf_jax.core.checksums import Checksums
from imgclf_jax.core.errors import UserError
from imgclf_jax.run import skipped
from imgclf_jax.run.skipped import Impossible, Skipped
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.run.writers import read_metrics
from imgclf_jax.train import loop as train
from imgclf_jax.train import replay
from imgclf_jax.train.setup import set_up

# Whole networks and meshes whose healthy steps must raise no alarm.
HEALTHY = [
    {},
    {"model": "cnn(widths=(4,), hidden=8)", "accumulate": 2, "precision": "bfloat16", "ema": 0.9},
    {"model": "resnet_cifar(8)", "mesh": "data=2, fsdp=4"},
    {"num_seeds": 2, "mesh": "seeds=2, data=4", "augment": "flip_lr|normalize"},
]


@pytest.fixture(scope="module")
def state():
    """Arrays of several dtypes, replicated and sharded over eight devices."""
    mesh = sharding.make_mesh(text="data=2, fsdp=4")
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    values = {
        "kernel": jax.device_put(jax.random.normal(jax.random.key(0), (6, 8)), split),
        "bias": sharding.put_replicated(np.linspace(-1, 1, 7, dtype=np.float32), mesh),
        "moment": sharding.put_replicated(np.asarray(jnp.linspace(-1, 1, 5, dtype=jnp.bfloat16)), mesh),
        "count": sharding.put_replicated(np.int32(3), mesh),
        "mask": sharding.put_replicated(np.array([True, False]), mesh),
        "empty": sharding.put_replicated(np.zeros((0, 3), np.float32), mesh),
    }
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values)
    return values, Checksums(like, mesh)


def test_every_flipped_bit_is_found_and_its_device(state):
    """200 single bits, drawn by seed, in all arrays that hold any: in one replica alone, and in all of them."""
    values, checksums = state
    before, rng = checksums(values), np.random.default_rng(0)
    assert before.shape == (8, 6)
    assert not checksums.differing_replicas(before).any()
    names = [name for name in checksums.names if name not in ("empty", "mask")]  # no bit of a bool but the last counts
    for number in range(200):
        name = names[number % len(names)]
        bit, place, device = (int(rng.integers(n)) for n in (8, 10**6, 8))
        one = {**values, name: flip(values[name], bit, place, device)}
        wrong = checksums(one) != before
        assert np.argwhere(wrong).tolist() == [[device, checksums.names.index(name)]], (name, bit, place, device)
        replicas = checksums.differing_replicas(checksums(one))
        assert replicas[:, checksums.names.index(name)].any()
        assert name in checksums.describe(wrong)
        assert f"on device {device}" in checksums.describe(wrong)
        everywhere = checksums({**values, name: flip(values[name], bit, place)})
        assert (everywhere != before).any()
        assert not checksums.differing_replicas(everywhere).any()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("more", "number"), [({}, 20), *thorough(({}, 200), ({"precision": "bfloat16", "accumulate": 2}, 200))], ids=str
)
def test_every_bit_that_a_computation_loses_is_found(more, number, fake_config, tmp_path, monkeypatch):
    """Single bits of activations, their gradients and the parameters' gradients, in one of the two computations of a
    step: each that changes a bit of the next state is found, and no other."""
    config = fake_config
    for key, value in {"model": "faulty_net:Net()", "gradient": "faulty_net:faulty_gradient", **more}.items():
        config[key] = value
    config.optimizer, config.schedule, config.check_every = "adam", "constant(1e-2)", "1 steps"
    make = sharding.make_mesh  # callbacks run on one device; the fixture `one_device` would last for the whole module
    monkeypatch.setattr(
        sharding, "make_mesh", lambda devices=None, *args, **kwargs: make(jax.devices()[:1], *args, **kwargs)
    )
    run = set_up(config, Workdir(tmp_path))
    replays, found = replay.Replays(config, Workdir(tmp_path)), []
    replays.attach(run)
    monkeypatch.setattr(replays, "corrupted", lambda step, what: found.append(what))

    def step(state, chunk):
        return run.programs.train(replays._copy(state), run.programs.zero_sums(), chunk, np.int32(1))[0]

    state, rng = run.state, np.random.default_rng(0)
    for steps, chunk in run.programs.chunks(run.images, [range(i, i + 1) for i in range(4)]):  # noqa: B007
        before, state = state, step(state, chunk)
    expected = [np.asarray(x) for x in jax.tree.leaves(state)]
    paths, _ = jax.tree_util.tree_flatten_with_path(state.params)
    sites, changed = [*faulty_net.SITES, *(jax.tree_util.keystr(path) for path, _ in paths)], Counter()
    for i in range(number):
        site = sites[i % len(sites)]
        faulty_net.FLIP[0] = (site, int(rng.integers(32)), int(rng.integers(10**6)))
        bad = step(before, chunk)
        differs = any(
            a.tobytes() != np.asarray(b).tobytes() for a, b in zip(expected, jax.tree.leaves(bad), strict=True)
        )
        faulty_net.FLIP[0] = None
        found.clear()
        replays.check(steps, replays._copy(before), run.programs.zero_sums(), chunk, bad)
        assert bool(found) == differs, (site, found)
        changed[site] += differs
    run.checkpoints.close()
    print(f"{changed.total()} of {number} flips changed the state: {dict(changed)}")
    assert changed.total() > number / 2
    assert not changed["d input"]  # no parameter depends on it
    assert number < 200 or all(changed[site] for site in sites if site != "d input")


@pytest.mark.thorough
@pytest.mark.parametrize("more", HEALTHY, ids=str)
def test_a_healthy_run_raises_no_alarm(more, fake_config, tmp_path, caplog):
    """And its bits are those of the run that compares nothing."""
    config = fake_config
    for key, value in more.items():
        config[key] = value
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    config.check_every = "3 steps"
    caplog.set_level("INFO")
    assert train.main(config, Workdir(tmp_path / "b")) == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert caplog.text.count("every bit is the same") == 4
    assert not (tmp_path / "b" / "corruption.jsonl").exists()


def corrupting(monkeypatch, when, where):
    """Flips a bit of the state that the train program returns, at the calls `when` of those that are replayed."""
    calls, original = iter(range(10**6)), replay.Replays.check

    def check(self, steps, before, window, chunk, state):
        if next(calls) in when:
            path, leaves = where, state.params["head"]
            leaves = {**leaves, path: flip(leaves[path], 3, 5)}
            state = state.replace(params={**state.params, "head": leaves})
        return original(self, steps, before, window, chunk, state)

    monkeypatch.setattr(replay.Replays, "check", check)


def test_corruption_stops_the_run_at_a_confirmed_checkpoint(fake_config, tmp_path, monkeypatch):
    """The message names step and parameter; the same command continues before the fault, with the bits of a healthy
    run."""
    config = fake_config
    config.total, config.check_every, config.checkpoint_every, config.checkpoint.keep = (
        "12 steps",
        "5 steps",
        "2 steps",
        9,
    )
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    with monkeypatch.context() as patch:
        corrupting(patch, {1}, "kernel")
        with pytest.raises(UserError, match=r"^step 9 gives other bits when .*: params/head/kernel.*continues from the "
                           "checkpoint of step 4"):  # fmt: skip
            train.main(config, Workdir(tmp_path / "b"))
    [line] = read_metrics(tmp_path / "b" / "corruption.jsonl")
    assert (line["step"], "params/head/kernel" in line["found"]) == (9, True)
    assert train.main(config, Workdir(tmp_path / "b")) == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


@pytest.mark.thorough
def test_no_checkpoint_hides_a_replica_that_differs(fake_config, tmp_path, monkeypatch):
    """A bit lost in one replica between two comparisons: the checkpoint before the next one would hold one replica."""
    config, original, lost = fake_config, replay.Replays.train, []
    config.total, config.check_every, config.checkpoint_every = "12 steps", "6 steps", "2 steps"
    config.on_corruption = "rollback"
    assert train.main(config, Workdir(tmp_path / "a")) == 0

    def compute(self, state, window, chunk, steps):
        state, window = original(self, state, window, chunk, steps)
        if steps.stop == 8 and not lost:
            lost.append(steps)
            bias = flip(state.params["head"]["bias"], 3, 5, device=0)
            state = state.replace(params={**state.params, "head": {**state.params["head"], "bias": bias}})
        return state, window

    monkeypatch.setattr(replay.Replays, "train", compute)
    assert train.main(config, Workdir(tmp_path / "b")) == 0
    [line] = read_metrics(tmp_path / "b" / "corruption.jsonl")
    assert line["step"] == 8
    assert line["found"].startswith("begins with replicas of other bits: params/head/bias on device ")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


IMPOSSIBLE = [  # of a guard that has skipped steps 3 and 7, at step 10: (what a bit makes of it, what is said)
    (lambda guard: guard.replace(skipped=guard.skipped + 1024), "counts 1026 skipped steps in 10"),
    (
        lambda guard: guard.replace(skipped=guard.skipped ^ jnp.int32(-(2**31))),
        "counts -2147483646 skipped steps in 10",
    ),
    (lambda guard: guard.replace(skipped=guard.skipped + 1), "says that step -1 was skipped among the steps 0 to 9"),
    (lambda guard: guard.replace(steps=guard.steps.at[1].add(16)), "says that step 23 was skipped among"),
]


@pytest.mark.parametrize(("lose", "said"), IMPOSSIBLE)
def test_counts_of_skipped_steps_that_no_run_has_are_corruption(lose, said, tmp_path):
    policy, loss = bad_steps.build("skip", ""), jnp.float32(1)
    guard = start = policy.init()
    for step in range(10):
        guard = policy.updated(guard, jnp.int32(step), loss, jnp.bool_(step in (3, 7)))
    record = Skipped(tmp_path, 0, start, 0)
    with pytest.raises(Impossible, match=f"^{said}"):
        record.note(lose(guard), 10)
    assert record.note(guard, 10) is None
    assert [line["step"] for line in read_metrics(tmp_path / "skipped.jsonl")] == [3, 7]
    record.close()


COUNTS = {  # what loses a bit in the state of step 8, and what is said
    "skipped": (lambda state: state.replace(guard=state.guard.replace(skipped=flip(state.guard.skipped, 2, 1))),
                "counts 1024 skipped steps in 2"),
    "steps": (lambda state: state.replace(step=flip(state.step, 1, 3)), "has a state that counts 33554440 steps"),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("check", ["", "6 steps"])
@pytest.mark.parametrize("what", COUNTS)
def test_a_bit_lost_in_a_count_is_found(what, check, fake_config, tmp_path, monkeypatch):
    """The message blamed the data, "1024 steps up to step -1 were skipped"; the checkpoint could not be restored."""
    lose, said = COUNTS[what]
    config, original, lost = fake_config, replay.Replays.train, []
    config.total, config.check_every, config.checkpoint_every, config.log_every = (
        "12 steps",
        check,
        "2 steps",
        "2 steps",
    )
    config.on_bad_step, config.on_corruption = "skip", "rollback"
    assert train.main(config, Workdir(tmp_path / "a")) == 0

    def compute(self, state, window, chunk, steps):
        state, window = original(self, state, window, chunk, steps)
        if steps.stop == 8 and not lost:
            lost.append(steps)
            state = lose(state)
        return state, window

    monkeypatch.setattr(replay.Replays, "train", compute)
    if check:
        assert train.main(config, Workdir(tmp_path / "b")) == 0
    else:
        with pytest.raises(
            UserError,
            match=rf"^step 8 {said}: a device .* continues from the checkpoint of step 6",
        ):
            train.main(config, Workdir(tmp_path / "b"))
        assert train.main(config, Workdir(tmp_path / "b")) == 0
    [line] = read_metrics(tmp_path / "b" / "corruption.jsonl")
    assert (line["step"], line["found"]) == (8, said)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


@pytest.mark.thorough
def test_corruption_rolls_back_and_at_last_stops(fake_config, tmp_path, monkeypatch):
    config = fake_config
    config.total, config.check_every, config.on_corruption = "12 steps", "5 steps", "rollback"
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    with monkeypatch.context() as patch:
        corrupting(patch, {1}, "bias")
        assert train.main(config, Workdir(tmp_path / "b")) == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert len(read_metrics(tmp_path / "b" / "corruption.jsonl")) == 1
    with monkeypatch.context() as patch:
        corrupting(patch, set(range(99)), "bias")
        with pytest.raises(UserError, match=r"\(3 times in this process\)"):
            train.main(config, Workdir(tmp_path / "c"))


@pytest.mark.thorough
def test_a_bad_step_is_computed_again_to_tell_who_is_to_blame(poisoned, tmp_path):  # noqa: F811
    """Equal bits: the data or the optimization."""
    poisoned.check_every = "5 steps"
    with pytest.raises(UserError, match=r"not finite at step 6.*computed twice with the same result, so the data or"):
        train.main(poisoned, Workdir(tmp_path))


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_loss_that_is_bad_only_once_is_corruption(policy, fake_config, tmp_path, monkeypatch):
    """Other bits: a device."""
    config = fake_config
    config.check_every, config.on_corruption = "5 steps", policy
    assert train.main(config, Workdir(tmp_path / "a")) == 0
    with monkeypatch.context() as patch:
        find, calls = train.diagnose.find_bad_step, iter(range(10**6))
        patch.setattr(
            train.diagnose, "find_bad_step", lambda sums: (4, 0, "not finite") if next(calls) == 1 else find(sums)
        )
        run = functools.partial(train.main, config, Workdir(tmp_path / "b"))
        if policy == "stop":
            with pytest.raises(UserError, match="step 4 was bad, and is not when it is computed again"):
                run()
        assert run() == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert [line["step"] for line in read_metrics(tmp_path / "b" / "corruption.jsonl")] == [4]


@pytest.mark.parametrize("second", [3, 6, 9])
@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_another_bad_step_in_the_second_computation_is_corruption(second, policy, fake_config, tmp_path):
    """Before or after the first: a device that fails at random never blames the data, and does not go on for ever."""
    fake_config.on_corruption = policy
    replays = replay.Replays(fake_config, Workdir(tmp_path))
    dropped = []
    replays._run = SimpleNamespace(
        cadences=SimpleNamespace(check=5),
        checkpoints=SimpleNamespace(drop_after=dropped.append, close=int, latest=4),
    )
    with pytest.raises(replay.Again):
        replays.recheck(5, 10)
    for number in range(1, 4):
        stops = policy == "stop" or number == 3
        with pytest.raises(UserError if stops else replay.Again, match="was bad, and is not when" if stops else None):
            replays.recheck(second if number % 2 else 5, 10)
        if stops:
            break
    assert len(read_metrics(tmp_path / "corruption.jsonl")) == number
    assert dropped == [0] * (number + 1)  # also when it stops: a checkpoint of a device that fails is not confirmed


def test_what_was_left_out_after_the_last_confirmed_step_is_forgotten(tmp_path):
    """A device that computes wrongly may have been why it was bad."""
    lines = [{"step": 0, "until": 9, "bad_step": 8}, {"step": 11, "seed": 0}, {"step": 20, "until": 31, "bad_step": 30}]
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skipped.forget_left_out(tmp_path, 30)
    assert read_metrics(tmp_path / "skipped.jsonl") == lines[:2]


@pytest.mark.thorough
def test_a_step_that_is_left_out_is_no_corruption(poisoned, tmp_path):  # noqa: F811
    """It was bad twice, and is not computed a third time."""
    poisoned.check_every, poisoned.on_bad_step = "5 steps", "rollback(steps=3)"
    assert train.main(poisoned, Workdir(tmp_path / "a")) == 0
    assert not (tmp_path / "a" / "corruption.jsonl").exists()
    poisoned.check_every = ""
    assert train.main(poisoned, Workdir(tmp_path / "b")) == 0
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_check_every_needs_deterministic_kernels(fake_config, tmp_path):
    from imgclf_jax import config as configs

    fake_config.check_every, fake_config.deterministic = "5 steps", False
    with pytest.raises(UserError, match="set deterministic=True"):
        configs.validate(fake_config)


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", ["data=-1", "data=2, fsdp=4", "seeds=2, data=4"])
def test_each_seed_skips_its_own_steps(mesh, poisoned, tmp_path):  # noqa: F811
    config = poisoned
    config.on_bad_step, config.num_seeds, config.mesh = "skip", 2, mesh
    assert train.main(config, Workdir(tmp_path)) == 0
    _, lines, left_out = outcome(tmp_path)
    expected = sorted((step_of(*one, seed), seed) for one in POISON for seed in (0, 1))
    assert [(line["step"], line["seed"]) for line in left_out] == expected
    assert np.isfinite([line["train/loss_std"] for line in lines if "train/loss_std" in line]).all()
