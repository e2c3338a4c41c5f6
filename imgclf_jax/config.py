"""The configuration: every key with its default and documentation, and the notation for durations.

A config file imports only this module: `get_config()` starts from `default_config()` and overrides keys.
"""

import json
import math
import re
import runpy
import traceback
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax.core.errors import UserError, check_choice, reason, unknown
from imgclf_jax.core.split_folders import split_folders
from imgclf_jax.core.typing import Value

# key: (default, meaning). The type of the default is the type of the key.
KEYS: dict[str, tuple[Value, str]] = {
    "seed": (0, "Seed of every random draw; 0 to 2**32 - 1."),
    "total": ("20 epochs", "How long to train: 'N epochs', 'N steps' or 'N examples' (5k, 1M)."),
    "stop": ("", "Early stopping: 'val/loss, patience 5 epochs' ends the run once the metric has not improved for so "
                 "long; your own metric as 'min:val/my_error, patience 10%'; empty: never."),
    "batch_size": (128, "Examples per step, over all devices and hosts; divisible by the number of devices."),
    "precision": ("float32", "Compute dtype of layers: 'float32' or 'bfloat16'. Parameters and logits stay float32."),
    "matmul_precision": ("float32", "Precision of float32 matmuls on TPU and GPU: float32, tensorfloat32, bfloat16."),
    "deterministic": (True, "Use deterministic GPU kernels, so a repeated run reproduces every bit."),
    "mesh": ("data=-1", "The device mesh; -1 takes all remaining devices. 'data=-1, fsdp=4' shards the train state."),
    "data.source": ("digits", "digits, tfds('name'), folder('path'), table('labels.csv'), arrays('file.npz') or "
                              "fake(n, shape, classes)."),
    "data.train": ("train", "The split to train on, in TFDS syntax: 'train[:90%]', 'train[1000:]+extra'."),
    "data.sampling": ("permutation", "The order and frequency of training examples: permutation, balanced, "
                                     "weighted('weights.npy'), subset('ids.npy'), or an import path."),
    "data.eval": ({"test": "test"}, 'Evaluation sets: a split for each name; "fake()/test" is of another source.'),
    "data.extra": ({}, "Extra streams for the method: a name, and a split or \"folder('crops')/train|batch_size(448)\" "
                       "for each; further options are preprocess('…') and sampling('…')."),
    "data.unreadable": ("error", "Unreadable image files: 'error' lists them all and stops, 'skip' leaves them out."),
    "data.data_dir": ("", "Directory or bucket of prepared TFDS data; empty means ~/tensorflow_datasets."),
    "data.manual_dir": ("", "Directory of manually downloaded TFDS archives, for machines without a network."),
    "data.placement": ("host", "'host' streams batches; 'device' keeps the whole uint8 data set on the accelerator."),
    "data.workers": (0, "Processes that read batches ahead; 0: a thread per core. Batches do not depend on it."),
    "preprocess": ("decode(3)", "Host ops for training, from encoded bytes to a fixed-shape uint8 image."),
    "preprocess_eval": ("", "Host ops for evaluation and prediction, without randomness; empty means those of "
                            "`preprocess`, with resize_small and central_crop in place of random_resized_crop."),
    "augment": ("", "Device ops on the batch, with pixels in [0, 1]; evaluation skips the random ones."),
    "mix": ("", "Mixing: mixup(0.2)|cutmix(1.0) draws one per batch; mixup(probability=0.5) mixes half of them."),
    "num_seeds": (1, "Replicas trained at once with seed, seed + 1, …; results are means with standard deviations."),
    "tta": ("", "Test-time augmentation: the mean logits of views, such as flip, translate(1) or 'flip|translate(1)'."),
    "model": ("cnn", "The backbone, such as resnet(depth=50), vit(head_init='zeros') or an import path."),
    "batch_norm": ("global", "Which examples BatchNorm statistics cover: 'global' (SyncBatchNorm), or 'groups(32)' "
                             "(ghost: 32 examples of the batch, with all their views)."),
    "init_from": ("", "Initial weights: a work directory, a file, 'FILE::model_ema' in it, timm('NAME', 'FILE'), or "
                      "efficientnet_lite0; the latter two fill in empty `model` and `preprocess`."),
    "init_strict": (True, "Refuse `init_from` if more than the head differs from the model; False loads what fits."),
    "loss": ("softmax", "softmax, sigmoid (a binary cross-entropy per class), focal, or an import path."),
    "method": ("supervised", "What a run learns from a batch: supervised, distill, fixmatch, lora, mean_teacher, "
                             "simclr, supcon, or an import path."),
    "gradient": ("", "Gradient transforms, such as sam, asam, pgd (adversarial training), 'sam|my_file:noisy(0.1)'."),
    "optimizer": ("adam", "An optax optimizer without its learning rate: adam, 'add_decayed_weights(5e-4)|sgd'."),
    "schedule": ("constant(1e-3)", "Learning-rate schedule: constant, cosine, linear, one_cycle, step or triangle."),
    "clip": (0.0, "Global norm to clip the gradient to; 0 does not clip."),
    "accumulate": (1, "Number of gradient-accumulation microbatches per step; more take less memory."),
    "ema": (0.0, "Decay of the weights' exponential moving average, such as 0.999, which evaluation uses; 0: off."),
    "on_bad_step": ("stop", "A step whose loss or gradient is not finite: 'stop' the run, or 'skip' the step."),
    "rules.lr": ("", "Learning-rate multipliers by parameter path, the first match: 'backbone/.*=0.1, head/.*=1'."),
    "rules.decay": ("", "Weight-decay multipliers by parameter path; '.*(bias|scale)=0' exempts biases and norms."),
    "rules.freeze": ("", "Patterns of the parameters to freeze: 'backbone/.*'; their modules run in evaluation mode."),
    "rules.shard": ("", "The axis of a parameter that fsdp shards: 'head/kernel=0, .*bias=none'; else the largest."),
    "rules.layer_decay": (0.0, "Layer-wise decay: a layer's learning rate over that of the layer above; 0: off."),
    "metrics": ("", "Evaluation metrics besides accuracy, loss, nll and top5: auc, balanced_accuracy, f1, 'auc|f1'."),
    "tensorboard": (True, "Write TensorBoard files next to metrics.jsonl."),
    "log_images": (False, "Write the first augmented images of step 0 to TensorBoard and `writers`."),
    "writers": ("", "Further metric writers, by import path: 'my_file:Wandb(project=\"x\")|my_file:Csv(\"a.csv\")'."),
    "log_every": ("50 steps", "How often to log training metrics; empty: never."),
    "eval_every": ("1 epochs", "How often to evaluate on every set of `data.eval`; empty: only at the end."),
    "checkpoint_every": ("1 epochs", "How often to save a checkpoint; empty: only at the end."),
    "watchdog": ("", "End the process after so long without a step, batch or evaluation: '10 min'; empty: never."),
    "check_every": ("", "Compute a step twice this often, to find silent data corruption: '1000 steps'; empty: never."),
    "checkpoint.keep": (2, "How many of the latest checkpoints to keep."),
    "checkpoint.best": ("", "Also keep the best checkpoint by a metric: 'val/accuracy', or yours, 'min:val/my_error'."),
}  # fmt: skip

# Keys that cannot be empty.
_NEEDED = ("total", "data.source", "data.train", "data.sampling", "model", "loss", "method", "schedule")

# The smallest value of a key and the limit below which it must be, and the values that a key may have.
_RANGES = {
    "seed": (0, 2**32), "ema": (0, 1), "rules.layer_decay": (0, 1), "clip": (0, math.inf),
    "batch_size": (1, math.inf), "num_seeds": (1, math.inf), "accumulate": (1, math.inf),
    "data.workers": (0, 2**10), "checkpoint.keep": (1, math.inf),
}  # fmt: skip
_CHOICES = {"precision": ("float32", "bfloat16"), "matmul_precision": ("float32", "tensorfloat32", "bfloat16"),
            "data.placement": ("host", "device"),
            "data.unreadable": ("error", "skip"), "on_bad_step": ("stop", "skip")}  # fmt: skip

# Keys of where and how a run computes: a resumed run may change them. `mesh` is among them, although another number of
# devices changes results by rounding.
LOCATION_KEYS = ("data.data_dir", "data.manual_dir", "data.placement", "data.workers", "tensorboard",
                 "log_images", "writers", "watchdog", "mesh", "rules.shard")  # fmt: skip

CADENCES = ("log_every", "eval_every", "checkpoint_every")

# Keys that no parameter depends on: a resumed run may change them, and its record then holds the new values.
FREE_KEYS = (*CADENCES, "check_every", "checkpoint.keep", "checkpoint.best", "metrics")


def free_keys(config: ConfigDict) -> tuple[str, ...]:
    """FREE_KEYS for this config: with early stopping, the last step depends on the steps that are evaluated."""
    return tuple(key for key in FREE_KEYS if not (config.stop and key == "eval_every"))


# Keys that may differ between the hosts of one run, which compare their data by fingerprint.
HOST_KEYS = ("data.data_dir", "data.manual_dir", "data.workers")

# Names that metrics.jsonl, result.json and `evaluate` use themselves, so no evaluation set can have them.
RESERVED = frozenset({"train", "step", "epochs", "seconds", "images_per_second", "params_sha256", "num_seeds",
                      "attack", "skipped", "stopped_early", "time"})  # fmt: skip


def default_config() -> ConfigDict:
    """Returns a config with every key at its default, which refuses unknown keys and values of other types."""
    nested: dict[str, Any] = {}
    for key, (default, _) in KEYS.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = default
    return ConfigDict(nested).lock()


def use_folder(config: ConfigDict, path: str) -> None:
    """Sets the keys `data.*` to the images of a folder, which has a folder per class or splits of such.

    What is missing is held out of the training images: a tenth for `val`, and a tenth for `test` if there is neither.
    """
    splits: dict[str, str] = {}
    for name, role in split_folders(path).items():
        splits.setdefault(role, name)
    train = splits.pop("train", "train")
    if not splits:
        splits = {"val": f"{train}[80%:90%]", "test": f"{train}[90%:]"}
        train = f"{train}[:80%]"
    elif "val" not in splits:
        splits = {"val": f"{train}[90%:]", **splits}
        train = f"{train}[:90%]"
    config.data.source, config.data.train, config.data.eval = f"folder({path!r})", train, splits


def load_file(path_and_arg: str) -> ConfigDict:
    """Returns the config that a file's `get_config()` returns; `path.py:arg` calls `get_config(arg)`."""
    path, _, arg = path_and_arg.partition(":")
    config = call(path, "get_config", arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path}: get_config() is missing, or returns {config!r}; write one that changes "
                        "default_config() and returns it")  # fmt: skip
    check_keys(config, path)
    return config.lock()


def call(path: str, function: str, arg: str) -> Any:
    """Calls a function of a Python file; None if the file has no such function.

    Raises UserError for any error inside, with its last line in the file.
    """
    try:
        called = runpy.run_path(path).get(function)
        return called and called(*filter(None, [arg]))
    except Exception as e:  # the user's code may raise anything
        lines = [f", line {frame.lineno}" for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        key = re.search(r'Key "(\w+)" does not exist', str(e))  # begins a message of many lines
        what = unknown("config key", key[1], KEYS) if key else f"{type(e).__name__}: {reason(e)}"
        raise UserError(f"config file {path}{''.join(lines[-1:])}: {what}") from e


def flatten(config: ConfigDict) -> dict[str, Value]:
    """Returns `{"data.source": …}` for every key; `data.eval` and `data.extra` stay dicts."""
    flat: dict[str, Value] = {}
    for name, value in config.to_dict().items():
        is_section = isinstance(value, dict) and name not in KEYS
        flat |= {f"{name}.{leaf}": v for leaf, v in value.items()} if is_section else {name: value}
    return flat


def check_keys(config: ConfigDict, where: str) -> None:
    """Raises UserError for an unknown key, a missing one, or a value of the wrong type."""
    flat = flatten(config)
    for key in flat:
        if key not in KEYS:
            raise UserError(f"{where}: {unknown('config key', key, KEYS)}")
    if missing := [key for key in KEYS if key not in flat]:
        raise UserError(f"{where}: missing config keys {', '.join(missing)}; start from default_config()")
    for key, (default, _) in KEYS.items():
        if type(flat[key]) is not type(default):
            raise UserError(f"{where}: {key}={flat[key]!r} must have the type {type(default).__name__}, such as "
                            f"{default!r}")  # fmt: skip
    for key in ("data.eval", "data.extra"):
        for name, split in flat[key].items():
            if not isinstance(split, str):
                raise UserError(f"{where}: {key}.{name}={split!r} is not a split, such as 'test'")


def validate(config: ConfigDict) -> None:
    """Raises UserError for values that no run can use. Specs are checked where they are built."""
    flat = flatten(config)
    for key in _NEEDED:
        if not flat[key].strip():
            raise UserError(f"{key} is empty; write a value, such as {KEYS[key][0]!r}")
    for key, (least, limit) in _RANGES.items():
        if not least <= flat[key] < limit:  # nor is NaN
            below = f", and below {limit}" if limit < math.inf else ""
            raise UserError(f"{key}={flat[key]}: must be {least} or more{below}")
    for key, allowed in _CHOICES.items():
        check_choice(key, flat[key], allowed)
    if config.seed + config.num_seeds > 2**32:
        raise UserError(f"seed={config.seed} with num_seeds={config.num_seeds}: the last seed exceeds 2**32 - 1")
    period(config.total, "total", 1000, 10)
    for key in (*CADENCES, "check_every"):
        period(config[key], key, 1000, 10, 10)
    seconds(config.watchdog, "watchdog")
    if config.check_every.strip() and not config.deterministic:
        raise UserError(f"check_every={config.check_every!r} compares two computations of a step, which may differ "
                        "with deterministic=False; set deterministic=True, or check_every=''")  # fmt: skip
    for name in config.data.eval:
        if name in RESERVED or not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"data.eval names a set {name!r}: use letters, digits, _ and -, and none of the names "
                            f"{', '.join(sorted(RESERVED))}")  # fmt: skip
    for key, text in selecting_metrics(config).items():
        name = re.sub("^(min|max):", "", text).partition("/")[0]
        if name not in config.data.eval:
            raise UserError(f"{key}={text!r}: " + unknown("evaluation set", name, config.data.eval))
    if config.stop:
        period(split_stop(config.stop)[1], "stop", 1000, 10, 10)
        if not config.eval_every:
            raise UserError(f"stop={config.stop!r} needs evaluations; set eval_every, such as '1 epochs'")


def selecting_metrics(config: ConfigDict) -> dict[str, str]:
    """The metrics by which a run chooses a checkpoint or its end, such as 'min:val/loss', by the keys naming them."""
    stop = split_stop(config.stop)[0] if config.stop else ""
    return {key: text for key, text in (("checkpoint.best", config.checkpoint.best), ("stop", stop)) if text}


def split_stop(text: str) -> tuple[str, str]:
    """The metric and the duration of the key `stop`, 'METRIC, patience DURATION'."""
    match = re.fullmatch(r"\s*(.*?)\s*,\s*patience\s+(.*?)\s*", text, re.DOTALL)
    if not match:
        raise UserError(f"stop={text!r}: write 'METRIC, patience DURATION', such as 'val/loss, patience 5 epochs'")
    return match[1], match[2]


_DURATION = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?(?:e\d{1,2})?)\s*([kM]?)\s*(epochs?|steps?|examples?|%)\s*")


def period(text: str, key: str, examples: int, batch_size: int, total: int | None = None) -> Fraction | None:
    """Steps in a duration such as '5 epochs', '2000 steps', '10%' (of `total`) or '1M examples', as a fraction.

    `examples` is the size of the training split. An event of period p falls on the steps ceil(k * p), k = 1, 2, …, so
    it does not drift when an epoch is not a whole number of batches. Empty text is None: never.
    """
    if not text.strip():
        return None
    match = _DURATION.fullmatch(text)
    if not match or not Fraction(match[1]) or (match[3] == "%" and total is None):
        percent = "" if total is None else ", or '10%' (of the total)"
        raise UserError(f"{key}={text!r} is not a duration; write '5 epochs', '2000 steps', '1M examples'{percent}")
    per_unit = {
        "ep": Fraction(examples, batch_size),
        "ex": Fraction(1, batch_size),
        "st": Fraction(1),
        "%": Fraction(total or 0, 100),
    }[match[3][:2]]
    return Fraction(match[1]) * {"": 1, "k": 1000, "M": 1_000_000}[match[2]] * per_unit


def steps(text: str, key: str, examples: int, batch_size: int, total: int | None = None) -> int:
    """`period`, rounded up to whole steps; 0 for empty text."""
    return math.ceil(period(text, key, examples, batch_size, total) or 0)


_TIME = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h)\s*")


def seconds(text: str, key: str) -> float:
    """The seconds of a time such as '90 s', '10 min' or '2 h'; 0 for empty text."""
    if not text.strip():
        return 0.0
    match = _TIME.fullmatch(text)
    if not match or not float(match[1]):
        raise UserError(f"{key}={text!r} is not a time above zero; write '90 s', '10 min' or '2 h'")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, nested like its keys."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str | bytes, where: str) -> ConfigDict:
    """Parses a config that `to_json` wrote. Raises UserError unless it has every key, with a value of its type."""
    try:
        config = ConfigDict(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{where} is damaged ({reason(e)}); restore it, or train into a new --workdir") from e
    check_keys(config, where)
    return config.lock()


def difference(old: ConfigDict, new: ConfigDict, without: Sequence[str] = ()) -> list[str]:
    """Returns a line "key: old → new" for each key whose value differs, except LOCATION_KEYS and `without`."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in KEYS if k not in LOCATION_KEYS and k not in without and a[k] != b[k]]
    return [f"{key}: {a[key]!r} → {b[key]!r}" for key in keys]
