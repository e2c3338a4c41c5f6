"""The plan of a `sweep`: values, directory names, and its file."""

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
    ("seed=7..7", "seed", ["7"]),
    ("config.seed=4; 2;9", "seed", ["4", "2", "9"]),
    ("schedule=constant(1e-3); cosine(1e-3, warmup='5 epochs')", "schedule",
     ["constant(1e-3)", "cosine(1e-3, warmup='5 epochs')"]),
    ("augment=pad_crop(2)|flip; normalize", "augment", ["pad_crop(2)|flip", "normalize"]),
    ("model=my:Net(name='a;b', sizes=[1; 2]); mlp", "model", ["my:Net(name='a;b', sizes=[1; 2])", "mlp"]),
    ("augment=['', 'flip; x', 'a=b']", "augment", ["", "flip; x", "a=b"]),
    ("clip=[0, 0.5, 1e-3]", "clip", ["0", "0.5", "0.001"]),
    ("deterministic=[True, False]", "deterministic", ["True", "False"]),
    ("total=0..2", "total", ["0..2"]),  # a text: no whole numbers
    ("data.eval.new=test; train[:10]", "data.eval.new", ["test", "train[:10]"]),
])  # fmt: skip
def test_values(text, key, values):
    assert sweep_plan.parse(text) == (key, values)


@pytest.mark.parametrize(("text", "said"), [
    ("seed", "must name a key and its values"),
    ("=3", "must name a key and its values"),
    ("sed=0", "unknown config key 'sed': did you mean 'seed'"),
    ("lr=1", "unknown config key 'lr'"),
    ("data.eval=test", "unknown config key 'data.eval'"),
    ("seed=3..1", "the range must be ascending"),
    ("seed=0..99999999", "the range must be ascending"),
    ("augment=flip;", "a value is empty"),
    ("augment=", "a value is empty"),
    ("model=mlp(1; cnn", "unbalanced brackets or quotes"),
    ("data.source=folder('it's'); digits", "unbalanced brackets or quotes"),
    ("seed=[0, x]", "is not a list of Python literals"),
    ("seed=[]", "has no values"),
    ("seed=[[1]]", "[1] is not a config value"),
])  # fmt: skip
def test_other_texts_are_refused(text, said):
    with pytest.raises(UserError, match=re.escape(said)):
        sweep_plan.parse(text)


def test_a_plan_of_the_file_with_seeds_of_the_command_line():
    found = sweep_plan.combine([{"model": "mlp", "clip": 1.0}, {"model": "cnn"}], ["seed=0..1"])
    assert found == [
        {"model": "mlp", "clip": "1.0", "seed": "0"},
        {"model": "mlp", "clip": "1.0", "seed": "1"},
        {"model": "cnn", "seed": "0"},
        {"model": "cnn", "seed": "1"},
    ]


@pytest.mark.parametrize(("planned", "sweeps", "said"), [
    (None, [], "a sweep needs values"),
    (None, ["seed=0", "seed=1"], "names seed twice"),
    ([{"seed": 0}], ["seed=1"], "seed is both in the config file's get_sweep() and in --sweep"),
    ([{"sed": 0}], [], "get_sweep(): unknown config key 'sed'"),
    ([{"seed": None}], [], "None is not a config value"),
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


def make(settings, recorded=None):
    return [run.name for run in sweep_plan.make(settings, typed, recorded or {})]


SAFE = re.compile(r"[A-Za-z0-9._+=,-]+")


def test_names_are_readable_and_safe():
    values = [{"schedule": "constant(1e-3)", "seed": "0"}, {"data.source": "folder('/a b/[c]/é')"}, {"augment": ""},
              {"model": "cnn(widths=(32, 64), hidden=128)|x"}, {"clip": "-1"}, {}]  # fmt: skip
    names = make(values)
    assert names[0] == "schedule=constant-1e-3,seed=0"
    assert names[1] == "data.source=folder-a-b-c"
    assert names[2] == "augment="
    assert re.fullmatch(r"model=cnn-widths-32-64-hidd-[0-9a-f]{6}", names[3])
    assert names[4:] == ["clip=-1", "base"]
    assert all(SAFE.fullmatch(name) for name in names)


def test_names_are_unique():
    """Names that become equal, also on a case-insensitive file system, get a hash."""
    names = make([{"model": m} for m in ("cnn(1)", "cnn[1]", "CNN(1)", "cnn-1", "ä", "ö")])
    assert len({name.casefold() for name in names}) == 6
    assert names[0] == "model=cnn-1"


def test_names_stay():
    """However a value is written, and whatever was added since."""
    first = sweep_plan.make([{"clip": "0.5"}, {"model": "cnn[1]"}], typed, {})
    recorded = {run.name: run.values for run in first}
    again = make([{"model": "cnn(1)"}, {"model": "cnn[1]"}, {"clip": "5e-1"}], recorded)
    assert again[1:] == ["model=cnn-1", "clip=0.5"]
    assert re.fullmatch(r"model=cnn-1-[0-9a-f]{6}", again[0])


PATHS = ("../elsewhere", "/elsewhere", "", ".", "..", "a/b")  # a run trains in the directory of its name


def test_the_file(tmp_path):
    """It returns the names, and refuses other keys and another config."""
    file, base = tmp_path / "sweep.json", default_config()
    assert sweep_plan.load(file, base, {"seed"}) == {}
    runs = sweep_plan.make([{"seed": "0"}, {"seed": "1"}], typed, {})
    sweep_plan.save(file, "c.py", base, ["seed"], runs, {"seed=9": {"seed": 9}})
    assert sweep_plan.load(file, base, {"seed"}) == {
        "seed=9": {"seed": 9},
        "seed=0": {"seed": 0},
        "seed=1": {"seed": 1},
    }
    with pytest.raises(UserError, match="has a sweep of seed, but this one sweeps model; sweep the same keys"):
        sweep_plan.load(file, base, {"model"})
    base.seed = 5  # each run sets it
    assert sweep_plan.load(file, base, {"seed"})
    base.total = "7 epochs"
    with pytest.raises(UserError, match=r"with another config .*total: '20 epochs' → '7 epochs'"):
        sweep_plan.load(file, base, {"seed"})
    for damaged in ("{", "[]", '{"base": {}}', file.read_text().replace('"seed": 9', '"sed": 9'),
                    *[file.read_text().replace('"seed=9"', f'"{name}"') for name in PATHS]):  # fmt: skip
        file.write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            sweep_plan.load(file, base, {"seed"})


@pytest.mark.parametrize(("function", "result"), [
    ("", None),
    ("def get_sweep(arg='x'):\n    return [{'seed': i, 'model': arg} for i in range(2)]",
     [{"seed": 0, "model": "x"}, {"seed": 1, "model": "x"}]),
    ("def get_sweep():\n    return []", "return a list of dicts"),
    ("def get_sweep():\n    return {'seed': [0, 1]}", "return a list of dicts"),
    ("def get_sweep():\n    return 1 / 0", "ZeroDivisionError: division by zero"),
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
