"""A user's mistakes: one sentence on stderr with what, where and the fix, no traceback, and nothing is lost."""

import re
from pathlib import Path

import numpy as np
import pytest
from cases import flags, noise
from flax import linen as nn
from PIL import Image

import launch
from imgclf_jax.core import kinds
from imgclf_jax.data.sources import fake

ROOT = Path(__file__).parent.parent
FAKE = flags("augment=", "model=mlp(widths=(512,))", "schedule=constant(1e-2)", "log_every=4 steps")


def nothing(given, total=0):
    """A part of a run that forgets to return."""


loss = examples = f1_std = ensemble_f1 = nothing  # metrics with the names of others


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
    (["trian"], ["unknown command 'trian'", "did you mean 'train'?", "config, "]),
    (["--config.bath_size=3"], ["unknown config key 'bath_size'", "did you mean 'batch_size' or", "allowed: "]),
    (["--config.batch_size=many"], ["--config.batch_size=many: must be a value of type int, such as 64"]),
    (["-workdir", "x"], ["unknown flag '-workdir'", "did you mean '--workdir' or"]),
    (["config", "--config.data.eval.x"], ["--config.data.eval.x needs a value: write --config.data.eval.x=VALUE"]),
    (["config", "--config=digts"], ["unknown config 'digts': did you mean 'digits'? allowed: cifar100_muon, cifar10"]),
    (["config", "--config=configs/folder.py:photos"], ["unknown config 'configs/folder.py': did you mean 'folder'? "]),
    (["train", "batch_size=4"], ["'batch_size=4': it is a config key: write --config.batch_size=VALUE"]),
    (["train", "digits"], ["train takes no files, but got 'digits': if that is a config, pass --config=digits"]),
    (["evaluate", "runs/a"], ["evaluate takes no files, but got 'runs/a': if that is a run, pass --workdir="]),
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
    ("seed=-1", "seed=-1: must be 0 or more, and below 4294967296"),
    ("total=5", ["total='5' is not a duration", "'5 epochs'"]),
    ("precision=half", ["unknown precision 'half'", "bfloat16, float32"]),
    ("checkpoint.best=accuracy", ["unknown evaluation set", "'accuracy'", "allowed: test"]),
    ("method=simclr; checkpoint.best=test/accuracy", "checkpoint.best='test/accuracy': evaluation has no 'accuracy'"),
    ("checkpoint.best=test/acuracy", ["did you mean 'accuracy' or", "'min:test/acuracy' if the smallest value of"]),
    ("model=mlp(widths=(1000000000000,))", ["the train state of model=", "with num_seeds=1 needs 1,788 TB of memory"]),
    ("batch_size=2000000000", "a batch of batch_size=2000000000 needs 1 TB of memory"),
    ("clip=nan", "clip=nan: must be 0 or more"),
    ("batch_size=12", ["batch_size=12 is not divisible by the 8 devices", "16 is"]),
    ("model=cnnn", ["unknown model 'cnnn'", "did you mean 'cnn'", "import path"]),
    ("model=cnn(width=3)", ["'cnn(width=3)'", "unknown argument 'width'", "did you mean 'widths'?"]),
    ("method=simclr(temperature='0.5')", "method=\"simclr(temperature='0.5')\" fails on images [12, 12, 1]"),
    ("model=nowhere:Net", ["cannot import 'nowhere'", "model 'nowhere:Net'"]),
    ("preprocess=resize(8)", ["preprocess='resize(8)'", "first op must be decode"]),
    ("preprocess=decode(2)", "decode(channels=2): allowed are 1, 3 and 4"),
    ("preprocess=decode(1)|central_crop(99)", ["central_crop(99, 99)", "12 by 12", "resize it first"]),
    ("augment=pad_crop(pad='x')", "augment=\"pad_crop(pad='x')\" fails on images [12, 12, 1]"),
    ("augment=jax.numpy:argsort", "[12, 12, 1] into int32[12, 12, 1]; device ops keep the shape and"),
    ("preprocess=decode(1)|test_mistakes:nothing", "nothing': test_mistakes:nothing returns None"),
    ("schedule=test_mistakes:nothing", "schedule='test_mistakes:nothing' gives None; return a function of the"),
    ("optimizer=test_mistakes:nothing", "optimizer='test_mistakes:nothing' returns None; return an optax.Gradient"),
    ("augment=normalize(mean=(0.5, 0.5))", "turns images [12, 12, 1] into float32[12, 12, 2]"),
    ("optimizer=adam(1e-3)", ["optimizer='adam(1e-3)'", "set the learning rate by the key schedule"]),
    ("optimizer=adam(b1='x')", "optimizer=\"adam(b1='x')\" fails"),
    ("schedule=cosine(1, warmup=5)", ["schedule='5' is not a duration", "'5 epochs'"]),
    ("schedule=cosine(1, warmup='99 steps')", ["a warmup of 99 steps", "run of 12 steps"]),
    ("loss=softmax(label_smoothing='a')", "loss=\"softmax(label_smoothing='a')\" fails"),
    ("data.source=photos", ["unknown source 'photos'", "write folder('photos')", "Datasets tfds('photos')"]),
    ("data.source=./photos", ["data.source='./photos'", "write folder('./photos')"]),
    ("model=", ["model is empty", "such as 'cnn'"]),
    ("data.eval.val=", "data.eval.val: split '' does not parse"),
    ("data.source=fake(8, 3)", ["fake(8, 3, 10): expected", "a shape (height, width, channels)"]),
    ("data.train=trian", ["unknown split 'trian'", "did you mean 'train'?", "allowed: test, train"]),
    ("data.train=train[:99]", "split 'train[:99]' reaches beyond the 64 examples"),
    ("data.eval.val=test[:60%]+test[40%:]", ["'test[:60%]+test[40%:]' overlap", "write parts that do not overlap"]),
    ("data.eval.val=digits()/test",
     ["data.eval.val='digits()/test' has 10 classes and the model 4", "'4' here and None in the model"]),
    # The configuration and its values.
    ("batch_size=0", "batch_size=0: must be 1 or more"),
    ("ema=1.0", "ema=1.0: must be 0 or more, and below 1"),
    ("num_seeds=4294967297", "the last seed exceeds 2**32 - 1"),
    ("total=", "total is empty; write a value, such as '20 epochs'"),
    ("total=10%", "total='10%' is not a duration"),
    ("total=200M steps; log_every=3000M examples", "log_every='3000M examples' sums over 2**31"),
    ("accumulate=4", ["batch_size=16 is not divisible by 32, the microbatches", "; 32 is"]),
    ("stop=test/loss", "write 'METRIC, patience DURATION', such as 'val/loss, patience 5 epochs'"),
    ("stop=val/loss, patience 5 epochs", "stop='val/loss': unknown evaluation set 'val'"),
    ("stop=test/loss, patience 5 epochs; eval_every=", "needs evaluations; set eval_every"),
    ("metrics=aucc", "unknown metric 'aucc': did you mean 'auc'"),
    ("metrics=auc(3)", "too many positional arguments"),
    *((f"metrics={text}", ["results have a metric ", " already"]) for text in
      ("auc|auc", *(f"{__name__}:{name}" for name in ("loss", "examples", "f1_std", "ensemble_f1")))),
    # Meshes.
    ("mesh=fsdp=-1; rules.shard=head/kernel=1", "axis 1 of head/kernel, [512, 4], does not divide into 8 shards"),
    ("mesh=fsdp=-1; rules.shard=head/kernel=x", "is not PATTERN=AXIS or PATTERN=none"),
    ("mesh=fsdp=-1; rules.shard=nothing=0", "rules.shard: 'nothing' matches no parameter"),
    ("mesh=data=3", "to 3, but the number of devices is 8"),
    ("mesh=model=2", "unknown axis of mesh 'model'"),
    ("mesh=data=-1, fsdp=-1", "name each axis once"),
    # Images.
    ("preprocess_eval=decode(1)|random_resized_crop(8)", "preprocess_eval='decode(1)|random_resized_crop(8)': random_"),
    ("preprocess=decode(1)|test_mistakes:noisy", ":noisy is random, but evaluation must be deterministic; set preproc"),
    ("preprocess=decode(1)|random_resized_crop(8, scale=(8, 100))", "no crop has an area in (8, 100) and a ratio in ("),
    ("preprocess=decode(1)|random_resized_crop(8, ratio=(0, 0))", "(0, 0); write (low, high) with 0 < low <= high"),
    ("preprocess=decode(1)|inception_crop(8, area=(1.0, 0.05))", "no crop has an area in (1.0, 0.05)"),
    ("preprocess=decode(1)|random_resized_crop(0)", ["on its way to 0 by 0, has ", " by 0 pixels; make it larger"]),
    ("preprocess=decode(1)|inception_crop(0)", "the image resized to 0 by 0 has 0 by 0 pixels"),
    ("preprocess=decode(1)|central_crop(0)", "the image after central_crop has 0 by 0 pixels"),
    ("preprocess=decode(1)|central_crop(-5)", "the image after central_crop has 0 by 0 pixels"),
    ("preprocess=decode(1)|resize_small(0)", "has 12 by 0 pixels"),
    ("augment=randaugment(2, 31)", ["magnitude=31", "0 to 30"]),
    ("augment=randaugment(2, 11, ops='big_vision')", ["magnitude=11", "0 to 10"]),
    ("augment=randaugment(2, 5, 1.0, ops='big_vision')", "without noise for 'big_vision'"),
    ("augment=randaugment(ops='bigvision')", "unknown randaugment ops 'bigvision': did you mean 'big_vision'"),
    ("augment=randaugment(fill=300)", ["fill=300", "from 0 to 255"]),
    ("augment=trivialaugment(fill=(1, 2))", ["fill=(1, 2)", "one per channel"]),
    ("augment=cutout(fill='color')", ["cutout(fill='color')", "from 0 to 255"]),
    ("augment=normalize|color_jitter", "color_jitter needs uint8 images, but these are float32; put it before normal"),
    ("augment=normalize(0.5, 127.5)", ["normalize(mean=0.5, std=127.5): ", "divide those of pixels from 0 to 255"]),
    ("augment=normalize(0.5, (0.0,))", "std must be above 0, and both at most 1"),
    ("augment=normalize|flip_lr|normalize(0.5)", "augment='normalize|flip_lr|normalize(0.5)': normalize occurs twice"),
    ("augment=color_jitter(brightness=-1)", "brightness=-1"),
    ("augment=color_jitter(hue=0.6)", ["hue=0.6", "0.5"]),
    ("augment=color_jitter(contrast=(2.0, 1.0))", "contrast=(2.0, 1.0)): its range must lie within 0.0 and inf"),
    ("mix=mixup(probability=0.7)|cutmix(probability=0.7)", "their sum at most 1"),
    ("mix=cutmix(probability=-0.1)", "from 0 to 1"),
    ("mix=cutmix(probability='x')", "from 0 to 1"),
    ("mix=mixup(0)", "alpha=0): must be above 0"),
    # Networks.
    ("model=mlp(dropout=1.5)", "model='mlp(dropout=1.5)': dropout=1.5 must be a number from 0 to below 1"),
    ("model=test_mistakes:centred", "model 'test_mistakes:centred': missing a required argument: 'images'"),
    ("model=fractions:Fraction", "is a Fraction, not a flax.linen.Module; for an nnx module"),
    ("model=test_mistakes:WithoutPrecision", "__call__ takes (self, x); add train"),
    ("model=resnet_cifar(8, norm='test_mistakes:WithoutPrecision')", "unexpected keyword argument 'dtype'"),
    ("model=resnet_cifar(norm='no_such_file:Norm')", "cannot import 'no_such_file' for norm 'no_such_file:Norm'"),
    ("model=resnet_cifar(depth=8, norm='group_norm')", "groups (32) does not divide the number of channels (16)"),
    ("model=resnet_cifar(depth=8, activation='flax.linen:PReLU')", "PReLU"),
    ("model=resnet_cifar(depth=8, block='basic_block')", "a spec names no block"),
    ("model=resnet_cifar(depth=8, shortcut='none')", "unknown shortcut 'none': did you mean 'conv'? allowed: conv"),
    ("model=resnet(18, norm='batch_norm(use_scale=False)')", "leaves no scale to start at 0; set zero_init="),
    ("model=resnet_cifar(depth=21)", "the depth must be 6n + 2, such as 20"),
    ("model=wide_resnet(depth=27)", "the depth must be 6n + 4, such as 28"),
    ("model=resnet(depth='50')", "the depth must be one of [18, 34, 50, 101, 152]"),
    ("model=vit('Ti', positions='fixed')", "sincos"),
    ("model=vit('Ti', patch=4, rope='dinov2')", "unknown vit rope 'dinov2': did you mean 'dinov3'?"),
    ("model=vit('Ti', patch=4, pool='cls+mean', class_token=True)", "class_token has no effect with pool='cls+mean'; "),
    ("model=vit('Ti', patch=4, pool='map', fc_norm=True)", "fc_norm has no effect with pool='map'; leave it out"),
    ("model=vit('Ti', patch=4, mlp='swiglu', activation='relu')", "activation has no effect with mlp='swiglu'; leave"),
    ("model=vit('Ti', patch=5)", "do not divide into patches of 5"),
    ("model=vit('Ti', patch=4, remat='blocks')", "remat='blocks': allowed are '' (store all activations) and 'block'"),
    ("model=convnext('X')", "allowed: B, S, T"),
    ("model=mixer('L')", "allowed: B, S"),
    ("model=cnn(widths=(4, 4, 4, 4))", "images of 12 by 12 are too small for 4 blocks"),
    ("model=convnext('T')", "convnext: images of 12 by 12 are too small; resize them to 32 by 32 or more"),
    ("model=rnn('lstn')", "unknown rnn cell 'lstn': did you mean 'lstm'? allowed: gru, lstm"),
    # Methods.
    ("method=simclr; mix=mixup(0.2)", "mix='mixup(0.2)': method='simclr' makes its own batches and does not mix them"),
    ("method=simclr; loss=softmax(label_smoothing=0.1)", "and has a loss of its own; leave loss='softmax'"),
    ("method=simclr; metrics=auc", "metrics='auc': method='simclr' trains no head"),
    ("method=simclr; tta=flip", "tta='flip': method='simclr' trains no head"),
    ("method=fixmatch", "fixmatch reads the stream data.extra.unlabeled, which this run lacks"),
    ("method=fixmatch(threshold=95)", "fixmatch(threshold=95): must be 0 to 1"),
    ("method=lora(pattern='backbone/qkv/kernel')", "lora(pattern): 'backbone/qkv/kernel' matches no parameter"),
    ("method=lora(pattern='backbone/.*')", "match only kernels"),
    ("method=lora; rules.freeze=backbone/.*", "method trains; remove the backbone from rules.freeze"),
    ("gradient=sam(roh=1)", "unknown argument 'roh': did you mean 'rho'"),
    ("gradient=pgd(eps=8)", "pgd(eps=8): must be above 0 and at most 1, the full range of a pixel"),
    ("gradient=pgd(eps='8/0')", "pgd(eps='8/0'): must be above 0 and at most 1"),
    ("gradient=pgd(eps='eight')", "write a number or a fraction such as '8/255'"),
    ("gradient=pgd(step_size=-0.1)", "pgd(step_size=-0.1): must be above 0"),
    ("gradient=pgd; augment=normalize|test_mistakes:centred", ["an attack needs a fixed scale ", "centred changes"]),
    # Optimization.
    ("optimizer=add_decayed_weights(0.1)", "unknown optimizer 'add_decayed_weights'"),
    ("optimizer=sgd|add_decayed_weights(0.1)", "expected exactly one optimizer; allowed before it are "),
    ("optimizer=lookahead(5)", "expected exactly one optimizer"),
    ("optimizer=adamw(learning_rate=0.1)", "unknown argument 'learning_rate'"),
    ("optimizer=schedule_free_sgd; rules.freeze=head/.*", "takes neither rules nor frozen parameters"),
    ("optimizer=sgd(momentum=0.9); rules.decay=.*bias=0", "rules.decay: optimizer='sgd(momentum=0.9)' has no weight"),
    ("optimizer=adamw(weight_decay=0); rules.decay=.*bias=0", "has no weight decay to multiply"),
    ("optimizer=sgd|lookahead(0, 0.5)", ["lookahead(k=0, ", "k must be an integer of 1 or more"]),
    ("optimizer=sgd|lookahead(5, 1.5)", ["alpha=1.5, ", "at most 1"]),
    ("optimizer=sgd|lookahead(5, power=-1)", "power=-1"),
    ("optimizer=sgd|lookahead(5, 0.5); ema=0.9", "ema=0.9 and lookahead(5, 0.5) both choose the weights to evaluate"),
    ("schedule=step(0.1, at=('5%',), warmup='10%')", ["every duration in at=", " must lie after warmup='10%'"]),
    ("rules.lr=backbone=0.1", "rules.lr: 'backbone' matches no parameter by its whole path; they are backbone/dense0"),
    ("rules.lr=head/.*=1, head/bias=2", "'head/bias' has no effect: earlier rules match all its parameters"),
    ("rules.lr=head/.*", "rules.lr: 'head/.*' is not PATTERN=NUMBER"),
    ("rules.decay=head/.*=-1", "rules.decay: 'head/.*=-1' is not PATTERN=NUMBER, a number of 0 or more"),
    ("rules.freeze=head/(bias", "rules.freeze: 'head/(bias' is not a regular expression: "),
    ("rules.freeze=.*", "matches every parameter: nothing is left to train"),
    # Splits and further streams.
    *((f"data.train={text}", ["does not parse"]) for text in
      ("train[5]", "train[1:2:3]", "train[:2.5]", "train+", "train[:1shard]", f"train[:{'9' * 5000}]")),
    ("data.train=train[10:50%]", "mixes a number with a percentage"),
    ("data.train=val", "--config.data.train='train[:90%]' --config.data.eval.test='train[90%:]'"),
    ("data.extra.label=train", "data.extra.label: the name must be a Python name other than image, label"),
    ("data.extra.a-b=train", "data.extra.a-b: the name must be a Python name"),
    ("data.extra.more=", "data.extra.more='' names no source; write"),
    ("data.extra.more=train|batch_size(12)", "data.extra.more: batch_size=12 is not divisible by the 8 devices"),
    ("data.extra.more=train|batch_size('8')", "batch_size('8') is no option; options are"),
    ("data.extra.more=train|sampling('balance')", "unknown sampling 'balance': did you mean 'balanced'"),
    ("data.extra.more=train|preprocess('decode(7)')", "data.extra.more: "),
    ("data.extra.more=train|sampling(\"weighted('none.npy')\")", "data.extra.more: sampling=\"weighted('none.npy')\":"),
])  # fmt: skip
def test_wrong_values(mistake, tmp_path, flag, fragments):
    """The key or name, the allowed values, and nothing written: all is checked before a run begins."""
    flags = [f"--config.{one}" for one in flag.split("; ")]
    fragments = [fragments] if isinstance(fragments, str) else fragments
    argv = [f for f in FAKE if not f.startswith(tuple(f"{one.partition('=')[0]}=" for one in flags))]
    assert has(mistake("train", f"--workdir={tmp_path / 'run'}", *argv, *flags), *fragments)
    assert snapshot(tmp_path) == {}


def test_a_folder_of_data_is_no_work_directory(mistake, tmp_path):
    (tmp_path / "cat").mkdir()
    assert has(mistake(*FAKE, f"--workdir={tmp_path}"), "holds the folder 'cat' and no run", "another --workdir")
    assert [file.name for file in tmp_path.iterdir()] == ["cat"]


@pytest.mark.thorough
def test_images_of_different_sizes(mistake, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(noise(16, 16 + i, 3)).save(tmp_path / "photos" / name / f"{i}.jpg")
    argv = (f"--config={ROOT}/configs/folder.py:{tmp_path / 'photos'}", f"--workdir={tmp_path / 'run'}",
            "--config.batch_size=8", "--config.preprocess_eval=decode(3)")  # fmt: skip
    assert has(mistake(*argv), "preprocess_eval='decode(3)' returns images of different shapes", "resize(height")
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
    moved = ("--config.data.data_dir=/elsewhere", "--config.data.workers=1", "--config.data.placement=device")
    assert launch.main(["train", f"--workdir={workdir}", *argv, *moved]) == 0
    assert "this run is done" in capsys.readouterr().err
    assert snapshot(workdir) == before
