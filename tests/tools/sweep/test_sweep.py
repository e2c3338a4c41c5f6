"""The command `sweep`: its plan, the runs it starts, how they end, and its output."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import launch
from imgclf_jax import config as configs
from imgclf_jax.cli.command_line import override
from imgclf_jax.config import default_config
from imgclf_jax.core.errors import UserError
from imgclf_jax.tools.sweep import command as sweep
from imgclf_jax.tools.sweep import plan as sweep_plan
from imgclf_jax.train.display import program

ROOT = Path(__file__).parents[3]

# Stands for `launch.py train`: leaves behind what a run of 12 steps does, in a tenth of a second.
TRAIN = """
import json, os, pathlib, signal, sys, time
words = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
place, behave = pathlib.Path(words["workdir"]), json.loads(os.environ.get("BEHAVE", "{}")).get(words["config.seed"], "")
place.mkdir(exist_ok=True)
(place / "platforms").write_text(str(os.environ.get("JAX_PLATFORMS")))
with (place.parent / "order").open("a") as file:
    print("begin", words["config.seed"], file=file)
if behave == "fail":
    print("error: no luck\\nmore", flush=True)
    sys.exit(1)
if behave == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if behave == "ask":
    def save(*_):
        print("saved", flush=True)
        sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
config = json.loads((place.parents[1] / "base.json").read_text()) | {"seed": int(words["config.seed"])}
(place / "config.json").write_text(json.dumps(config))
data = {"train_examples": 64, "image_shape": [12, 12, 1], "class_names": ["a", "b"], "fingerprint": "x"}
(place / "provenance.json").write_text(json.dumps({"data": data}))
(place / "result.json").write_text(json.dumps({"step": 12, "test": {"accuracy": 0.5, "accuracy_std": 0.25}}))
with (place.parent / "order").open("a") as file:
    print("end", words["config.seed"], file=file)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs a sweep over seeds whose runs are those of TRAIN; gives the exit status and the lines printed."""
    (tmp_path / "train.py").write_text(TRAIN)
    base = configs.call(str(ROOT / "configs" / "digits.py"), "get_config", "")
    base.total = "12 steps"
    (tmp_path / "base.json").write_text(configs.to_json(base))
    whole = sweep._command
    stub = [sys.executable, str(tmp_path / "train.py")]
    monkeypatch.setattr(sweep, "_command", lambda *args: [*stub, *whole(*args)[2:]])

    def call(*argv, **behave):
        monkeypatch.setenv("BEHAVE", json.dumps({name.removeprefix("s"): how for name, how in behave.items()}))
        capfd.readouterr()
        status = launch.main(["sweep", f"--workdir={tmp_path / 'w'}", "--config.total=12 steps", *argv])
        call.out, call.err = capfd.readouterr()
        return status, [re.sub(r"\d+\.\d s", "N s", " ".join(line.split())) for line in call.out.splitlines()]

    call.folder = tmp_path / "w"
    return call


def test_runs_that_are_done_are_skipped(run, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    status, lines = run("--sweep=seed=0..1")
    last = ["2 of 2 runs are done; compare them:", f"{program()} compare {run.folder}"]
    assert (status, lines) == (0, [*(f"seed={i} done N s" for i in (0, 1)), *last])
    assert (run.folder / "order").read_text().split() == ["begin", "0", "end", "0", "begin", "1", "end", "1"]
    assert (run.folder / "seed=0" / "platforms").read_text() == "tpu,cpu"  # the sweep itself takes no accelerator
    status, lines = run("--sweep=seed=0..2")  # one more
    assert status == 0
    assert lines[:3] == ["seed=0 done before", "seed=1 done before", "seed=2 done N s"]
    assert run("--sweep=seed=0", "--config.batch_size=32")[1][0] == "seed=0 done N s"  # of another config


def test_one_that_fails_stops_no_other(run):
    status, lines = run("--sweep=seed=0..2", s0="fail", s1="die")
    assert status == 1
    assert lines[0] == f"seed=0 failed N s error: no luck; see {run.folder}/seed=0.log"
    assert lines[1] == f"seed=1 failed N s killed by SIGKILL; see {run.folder}/seed=1.log"
    assert lines[2].startswith("seed=2 done")
    status, lines = run("--sweep=seed=0..2", s1="die")
    assert [line.split(" N s")[0] for line in lines[:3]] == ["seed=2 done before", "seed=0 done", "seed=1 failed"]
    log = (run.folder / "seed=0.log").read_text().splitlines()
    assert [line[0] for line in log] == ["$", "e", "m", "$"]  # both attempts
    assert shlex.split(log[0])[-2:] == ["--config.seed=0", f"--workdir={run.folder}/seed=0"]


def test_a_signal_is_passed_on(run):
    """The run saves, waiting runs are not started, and the next sweep continues."""
    status, lines = run("--sweep=seed=0..2", s0="", s1="ask")
    assert status == 75
    assert [line.split(" N s")[0] for line in lines[:3]] == [
        "seed=0 done", "seed=1 stopped", "1 of 3 runs are done; compare them:"]  # fmt: skip
    assert (run.folder / "seed=1.log").read_text().splitlines()[-1] == "saved"
    assert "SIGTERM: stopped; run the same command to continue" in run.err
    assert not (run.folder / "seed=2").exists()
    status, lines = run("--sweep=seed=0..2")
    assert status == 0
    assert lines[3].startswith("3 of 3 runs are done")


def test_print(run):
    """One command per run, as the sweep would start it; nothing is started."""
    assert run("--sweep=model=mlp; cnn(hidden=8)", "--print", "--config.data.source=fake(8)")[0] == 0
    words = [shlex.split(line) for line in run.out.splitlines()]
    assert [own[2] for own in words] == ["train", "train"]
    assert words[1][3].endswith("configs/digits.py")
    assert words[1][4:] == ["--config.total=12 steps", "--config.data.source=fake(8)", "--config.model=cnn(hidden=8)",
                            f"--workdir={run.folder / 'model=cnn-hidden-8'}"]  # fmt: skip
    assert not run.folder.exists()


@pytest.mark.parametrize(("argv", "said"), [
    (["--sweep=seed=0; x"], "no run was started: --config.seed=x: must be a value of type int, such as 0"),
    (["--sweep=seed=0,1"], "values of --sweep are separated by ';'"),
    (["--sweep=schedule=constant(1e-3); constnt(1)"], "no run was started: unknown schedule 'constnt'"),
    (["--sweep=batch_size=[8, 0]"], "no run was started: batch_size=0: must be 1 or more"),
])  # fmt: skip
def test_nothing_begins_with_a_mistake(run, argv, said):
    status, lines = run(*argv)
    assert (status, lines) == (1, [])
    assert said in run.err
    assert run.err.count("\n") == 1
    assert not run.folder.exists()


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
