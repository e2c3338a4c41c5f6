"""A user's mistakes: one sentence on stderr with what, where and the fix, no traceback, and nothing is lost."""

import re
from pathlib import Path

import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

import launch
from imgclf_jax.core import kinds
from imgclf_jax.data.sources import fake

ROOT = Path(__file__).parent.parent
FAKE = ("--config.data.source=fake(64, (12, 12, 1), 4)", "--config.preprocess=decode(1)", "--config.augment=",
        "--config.model=mlp(widths=(512,))", "--config.schedule=constant(1e-2)", "--config.total=12 steps",
        "--config.batch_size=16", "--config.checkpoint_every=4 steps", "--config.eval_every=6 steps",
        "--config.log_every=4 steps")  # fmt: skip


def nothing(given, total=0):
    """A part of a run that forgets to return."""


def centred(images):
    """A user's plain op, which has no fixed scale."""
    return images - images.mean((1, 2, 3), keepdims=True)


class WithoutPrecision(nn.Module):
    """A normalization that no backbone can use, and no backbone."""

    def __call__(self, x):
        return x


@kinds.random
def noisy(rng, image):
    """A user's random host op, which has no counterpart in evaluation."""
    return image


@pytest.fixture
def mistake(capsys):
    """Runs a command line that must fail with one sentence, and returns it."""

    def run(*argv: str, status: int = 1, log: str = r"(?!)") -> str:
        """Lines of the log that match `log` may precede the sentence."""
        capsys.readouterr()
        assert launch.main([str(a) for a in argv]) == status
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if not re.search(log, line)]
        assert out == ""
        assert said[1:] == (["see launch.py --help"] if status == 2 else [])
        assert said[0].startswith("error: ")
        return said[0].removeprefix("error: ")

    return run


def has(sentence: str, *fragments: str) -> bool:
    return all(f in sentence for f in fragments)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """A finished run on arrays in a file: its work directory, and its flags."""
    folder = tmp_path_factory.mktemp("whole")
    arrays = {}
    for name, source in fake(64, (12, 12, 1), 4).items():
        examples = source.read(np.arange(64))
        arrays |= {f"x_{name}": examples["image"], f"y_{name}": examples["label"]}
    np.savez(folder / "data.npz", **arrays)
    argv = (*FAKE, f"--config.data.source=arrays({str(folder / 'data.npz')!r})")
    assert launch.main(["train", f"--workdir={folder / 'run'}", *argv]) == 0
    return folder / "run", argv


USAGE = [
    (["trian"], ["unknown command 'trian'", "did you mean 'train'?", "dryrun, evaluate"]),
    (["--config.bath_size=3"], ["unknown config key 'bath_size'", "did you mean 'batch_size' or", "allowed: "]),
    (["--config.batch_size=many"], ["--config.batch_size=many: must be a value of type int, such as 64"]),
    (["-workdir", "x"], ["unknown flag '-workdir'", "did you mean '--workdir' or"]),
    (["config", "--config.data.eval.x"], ["--config.data.eval.x needs a value: write --config.data.eval.x=VALUE"]),
    (["config", "--config=digts"], ["unknown config 'digts': did you mean 'digits'? allowed: cifar10_airbench, cifar"]),
    (["config", "--config=configs/folder.py:photos"], ["unknown config 'configs/folder.py': did you mean 'folder'? "]),
    (["train", "batch_size=4"], ["'batch_size=4': it is a config key: write --config.batch_size=VALUE"]),
    (["train", "digits"], ["train takes no files, but got 'digits': if that is a config, pass --config=digits"]),
    (
        ["evaluate", "runs/photos"],
        ["evaluate takes no files, but got 'runs/photos': if that is a run, pass --workdir="],
    ),
    (["status", "runs", "--config.seed=3"], ["status takes no config, but got --config.seed"]),
    (["reproduce", "--workdir=runs/a"], ["reproduce takes directories without a flag: write reproduce runs/a"]),
    (["reproduce"], ["reproduce takes one WORKDIR|BUNDLE, but got none"]),
    (["probe", "--checkpoint=best", "--config.init_from=w.pth"], ["or weights (--config.init_from), not both; drop"]),
    (["predict", "--top_k=0"], ["--top_k", "0: must be 1 or more"]),
    (["evaluate", "--format=xml"], ["--format", "'xml'", "table, json"]),
    (["--profile=3"], ["--profile: 3", "FIRST:LAST", "10:20"]),
    (["sweep"], ["a sweep needs values: --sweep 'schedule=constant(1e-3); constant(3e-3)'"]),
    (["export"], ["name the file to write"]),
    (["dryrun"], ["dryrun needs --chips"]),
    (["dryrun", "--chips=cpu:8", "--shape=8,8"], ["--shape=8,8: must be height, width and channels"]),
    (["dryrun", "--chips=cpu:8", "--classes=2", "--targets=2"], ["give --classes or --targets, not both"]),
    (["dryrun", "--chips=tpu:8"], ["--chips=tpu:8: allowed: v5e:4x4"]),
    (["find-lr", "--low=1", "--high=0.1"], ["--low=1 --high=0.1: give two learning rates, 0 < low < high"]),
    (["find-lr", "--steps=3"], ["--steps=3: a range test takes at least 10 steps"]),
]


@pytest.mark.parametrize(("argv", "fragments"), USAGE)
def test_wrong_usage(mistake, tmp_path, monkeypatch, argv, fragments):
    """Exit status 2, the nearest names, and no work directory."""
    monkeypatch.chdir(tmp_path)
    assert has(mistake(*argv, status=2), *fragments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "fragments"), [
    ("seed=-1", ["seed=-1: must be 0 or more, and below 4294967296"]),
    ("total=5", ["total='5' is not a duration", "'5 epochs'"]),
    ("precision=half", ["unknown precision 'half'", "bfloat16, float32"]),
    ("checkpoint.best=accuracy", ["unknown evaluation set", "'accuracy'", "allowed: test"]),
    ("checkpoint.best=test/acuracy", ["did you mean 'accuracy' or", "'min:test/acuracy' if the smallest value of"]),
    ("model=mlp(widths=(1000000000000,))", ["the train state of model=", "with num_seeds=1 needs 1,788 TB of memory"]),
    ("batch_size=2000000000", ["a batch of batch_size=2000000000 needs 1 TB of memory"]),
    ("clip=nan", ["clip=nan: must be 0 or more"]),
    ("batch_size=12", ["batch_size=12 is not divisible by the 8 devices", "16 is"]),
    ("model=cnnn", ["unknown model 'cnnn'", "did you mean 'cnn'", "import path"]),
    ("model=cnn(width=3)", ["'cnn(width=3)'", "unknown argument 'width'", "did you mean 'widths'?"]),
    ("method=simclr(temperature='0.5')", ["method=\"simclr(temperature='0.5')\" fails on images [12, 12, 1]"]),
    ("model=nowhere:Net", ["cannot import 'nowhere'", "model 'nowhere:Net'"]),
    ("preprocess=resize(8)", ["preprocess='resize(8)'", "first op must be decode"]),
    ("preprocess=decode(2)", ["decode(channels=2): allowed are 1, 3 and 4"]),
    ("preprocess=decode(1)|central_crop(99)", ["central_crop(99, 99)", "12 by 12", "resize it first"]),
    ("augment=pad_crop(pad='x')", ["augment=\"pad_crop(pad='x')\" fails on images [12, 12, 1]"]),
    ("augment=jax.numpy:argsort", ["[12, 12, 1] into int32[12, 12, 1]; device ops keep the shape and"]),
    ("preprocess=decode(1)|test_mistakes:nothing", ["nothing': test_mistakes:nothing returns None"]),
    ("schedule=test_mistakes:nothing", ["schedule='test_mistakes:nothing' gives 'None'; return a function of the"]),
    ("optimizer=test_mistakes:nothing", ["optimizer='test_mistakes:nothing' returns None; return an optax.Gradient"]),
    ("augment=normalize(mean=(0.5, 0.5))", ["turns images [12, 12, 1] into float32[12, 12, 2]"]),
    ("optimizer=adam(1e-3)", ["optimizer='adam(1e-3)'", "set the learning rate by the key schedule"]),
    ("optimizer=adam(b1='x')", ["optimizer=\"adam(b1='x')\" fails"]),
    ("schedule=cosine(1, warmup=5)", ["schedule='5' is not a duration", "'5 epochs'"]),
    ("schedule=cosine(1, warmup='99 steps')", ["a warmup of 99 steps", "run of 12 steps"]),
    ("loss=softmax(label_smoothing='a')", ["loss=\"softmax(label_smoothing='a')\" fails"]),
    ("data.source=photos", ["unknown source 'photos'", "write folder('photos')", "Datasets tfds('photos')"]),
    ("data.source=./photos", ["data.source='./photos'", "write folder('./photos')"]),
    ("model=", ["model is empty", "such as 'cnn'"]),
    ("data.eval.val=", ["data.eval.val: split '' does not parse"]),
    ("data.source=fake(8, 3)", ["fake(8, 3, 10): expected", "a shape (height, width, channels)"]),
    ("data.train=trian", ["unknown split 'trian'", "did you mean 'train'?", "allowed: test, train"]),
    ("data.train=train[:99]", ["split 'train[:99]' reaches beyond the 64 examples"]),
    ("data.eval.val=test[:60%]+test[40%:]", ["'test[:60%]+test[40%:]' overlap", "write parts that do not overlap"]),
    ("data.eval.val=digits()/test",
     ["data.eval.val='digits()/test' has 10 classes and the model 4", "'4' here and None in the model"]),
])  # fmt: skip
def test_wrong_values(mistake, tmp_path, flag, fragments):
    """The key or name, the allowed values, and nothing written: all is checked before a run begins."""
    argv = [f for f in FAKE if not f.startswith(f"--config.{flag.partition('=')[0]}=")]
    assert has(mistake("train", f"--workdir={tmp_path / 'run'}", *argv, f"--config.{flag}"), *fragments)
    assert snapshot(tmp_path) == {}


def test_sums_that_would_overflow(mistake, tmp_path):
    argv = [f for f in FAKE if not f.startswith(("--config.total=", "--config.log_every="))]
    argv += ["--config.total=200M steps", "--config.log_every=3000M examples"]
    assert has(mistake("train", f"--workdir={tmp_path / 'run'}", *argv), "log_every='3000M examples' sums over 2**31")


def test_a_folder_of_data_is_no_work_directory(mistake, tmp_path):
    """A run in the folder of one's photographs left files there that the next start took for a class."""
    (tmp_path / "cat").mkdir()
    assert has(mistake(*FAKE, f"--workdir={tmp_path}"), "holds the folder 'cat' and no run", "another --workdir")
    assert [file.name for file in tmp_path.iterdir()] == ["cat"]


@pytest.mark.thorough
def test_images_of_different_sizes(mistake, tmp_path):
    """What evaluation and training need is said before they begin."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (16, 16 + i, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.jpg")
    argv = (f"--config={ROOT}/configs/folder.py:{tmp_path / 'photos'}", f"--workdir={tmp_path / 'run'}",
            "--config.batch_size=8", "--config.preprocess_eval=decode(3)")  # fmt: skip
    assert has(
        mistake(*argv), "preprocess_eval='decode(3)' returns images of different shapes", "resize(height, width)"
    )
    argv += ("--config.preprocess=decode(3)", "--config.data.train=train", "--config.data.eval={}",
             "--config.checkpoint.best=", "--config.model=mlp")  # fmt: skip
    sentence = mistake(*argv, log=r"^\d\d:\d\d:\d\d|^  ")
    assert has(sentence, "preprocess='decode(3)' returns images of different shapes", "add resize(height, width)")


@pytest.mark.thorough
def test_another_config(mistake, whole, capsys):
    """The keys that differ are shown, old and new; keys that only locate data may differ."""
    workdir, argv = whole
    before = snapshot(workdir)
    sentence = mistake("train", f"--workdir={workdir}", *argv, "--config.seed=1", "--config.total=13 steps")
    assert has(sentence, "seed: 0 → 1; total: '12 steps' → '13 steps'", "use the old values", "another --workdir")
    moved = ("--config.data.data_dir=/elsewhere", "--config.data.threads=1", "--config.data.placement=device")
    assert launch.main(["train", f"--workdir={workdir}", *argv, *moved]) == 0
    assert "this run is done" in capsys.readouterr().err
    assert snapshot(workdir) == before
