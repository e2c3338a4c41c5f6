"""The plan of a `sweep`: values and directory names."""

import re

import pytest

from imgclf_jax.cli.command_line import override
from imgclf_jax.config import default_config
from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.sweep import plan as sweep_plan

CONFIG = """
from imgclf_jax.config import default_config
def get_config(arg="x"):
    return default_config()
"""


@pytest.mark.parametrize(("text", "key", "values"), [
    ("seed=0..3", "seed", ["0", "1", "2", "3"]),
    ("config.seed=4; 2;9", "seed", ["4", "2", "9"]),
    ("schedule=constant(1e-3); cosine(1e-3, warmup='5 epochs')", "schedule",
     ["constant(1e-3)", "cosine(1e-3, warmup='5 epochs')"]),
    ("augment=['', 'flip; x', 'a=b']", "augment", ["", "flip; x", "a=b"]),
    ("clip=[0, 0.5, 1e-3]", "clip", ["0", "0.5", "0.001"]),
    ("total=0..2", "total", ["0..2"]),  # a text: no whole numbers
    ("data.eval.new=test; train[:10]", "data.eval.new", ["test", "train[:10]"]),
])  # fmt: skip
def test_values(text, key, values):
    assert sweep_plan.parse(text) == (key, values)


@pytest.mark.parametrize(("text", "said"), [
    ("seed", "must name a key and its values"),
    ("data.eval=test", "unknown config key 'data.eval'"),
    ("seed=3..1", "the range must be ascending"),
    ("augment=flip;", "a value is empty"),
    ("seed=[0, x]", "is not a list of Python literals"),
    ("seed=[]", "has no values"),
    ("seed=[[1]]", "[1] is not a config value"),
])  # fmt: skip
def test_other_texts_are_refused(text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        sweep_plan.parse(text)


def test_a_plan_of_the_file_with_seeds_of_the_command_line():
    found = sweep_plan.combine([{"model": "mlp", "clip": 1.0}, {"model": "cnn"}], ["seed=0..1"])
    first = {"model": "mlp", "clip": "1.0"}
    assert found == [first | {"seed": "0"}, first | {"seed": "1"}, *({"model": "cnn", "seed": s} for s in "01")]


@pytest.mark.parametrize(("planned", "sweeps", "said"), [
    (None, ["seed=0", "seed=1"], "names seed twice"),
    ([{"seed": 0}], ["seed=1"], "seed is both in the config file's get_sweep() and in --sweep"),
    ([{"sed": 0}], [], "get_sweep(): unknown config key 'sed'"),
    (None, ["seed=0..200", "clip=[0.0, 1.0, 2.0]", "ema=[0.1, 0.2]", "batch_size=1..10"], "has 12060 runs"),
])  # fmt: skip
def test_plans_that_are_refused(planned, sweeps, said):
    with pytest.raises(UserError, match=re.escape(said)):
        sweep_plan.combine(planned, sweeps)


def typed(settings):
    """The config of a run."""
    config = default_config()
    override(config, settings.items())
    return config


def make(settings):
    return [run.name for run in sweep_plan.make(settings, typed)]


def test_names_are_readable_and_safe():
    values = [{"schedule": "constant(1e-3)", "seed": "0"}, {"data.source": "folder('/a b/[c]/é')"}, {"augment": ""},
              {"model": "cnn(widths=(32, 64), hidden=128)|x"}, {"clip": "-1"}, {}]  # fmt: skip
    names = make(values)
    assert names == ["schedule=constant-1e-3,seed=0", "data.source=folder-a-b-c", "augment=",
                     "model=cnn-widths-32-64-hidden-128-x", "clip=-1.0", "base"]  # fmt: skip


def test_names_are_unique_and_short():
    """Names that become equal, also on a case-insensitive file system, get a hash."""
    names = make([{"model": m} for m in ("cnn(1)", "cnn[1]", "CNN(1)", "cnn-1", "ä", "ö", "x" * 300)])
    assert len({name.casefold() for name in names}) == 7
    assert names[0] == "model=cnn-1"
    assert max(map(len, names)) <= 120


@pytest.mark.parametrize(("function", "result"), [
    ("", None),
    ("def get_sweep(arg='x'):\n    return [{'seed': i, 'model': arg} for i in range(2)]",
     [{"seed": 0, "model": "x"}, {"seed": 1, "model": "x"}]),
    ("def get_sweep():\n    return {'seed': [0, 1]}", "return a list of dicts"),
])  # fmt: skip
def test_get_sweep(tmp_path, function, result):
    file = tmp_path / "c.py"
    file.write_text(CONFIG + function + "\n")
    if isinstance(result, str):
        with pytest.raises(UserError, match=result):
            sweep_plan.load_sweep(str(file))
        return
    assert sweep_plan.load_sweep(str(file)) == result
    if result:
        assert sweep_plan.load_sweep(f"{file}:mlp") == [run | {"model": "mlp"} for run in result]
