"""The configuration: every key with its default and documentation, and the notation for durations.

A config file imports only this module: `get_config()` starts from `default_config()` and overrides keys.
"""

import contextlib
import difflib
import importlib.util
import json
import logging
import math
import re
import traceback
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from imgclf_jax.core.errors import UserError, reason, unknown
from imgclf_jax.core.split_folders import split_folders as split_folders
from imgclf_jax.core.typing import Value

log = logging.getLogger(__name__)

# key: (default, meaning). The type of the default is the type of the key.
KEYS: dict[str, tuple[Value, str]] = {
    "seed": (0, "Seed of every random draw; 0 to 2**32 - 1."),
    "total": ("20 epochs", "How long to train: 'N epochs', 'N steps' or 'N examples' (5k, 1M)."),
    "stop": ("", "Early stopping: 'val/loss, patience 5 epochs' ends the run once the metric has not improved for so "
                 "long; your own metric as 'min:val/my_error, patience 10%'; empty: never."),
    "batch_size": (128, "Examples per step, over all devices and hosts; divisible by the number of devices."),
    "precision": ("float32", "Compute dtype of layers: 'float32' or 'bfloat16'. Parameters and logits stay float32."),
    "matmul_precision": ("float32", "Precision of float32 matmuls on TPU and GPU: 'float32', 'tensorfloat32' or "
                                    "'bfloat16'."),
    "deterministic": (True, "Use deterministic GPU kernels, so a repeated run reproduces every bit."),
    "mesh": ("data=-1", "The device mesh; -1 takes all remaining devices. 'data=-1, fsdp=4' shards the train state."),
    "data.source": ("digits", "digits, tfds('name'), folder('path'), table('labels.csv'), arrays('file.npz') or "
                              "fake(n, shape, classes)."),
    "data.train": ("train", "The split to train on, in TFDS syntax: 'train[:90%]', 'train[1000:]+extra'."),
    "data.sampling": ("permutation", "The order and frequency of training examples: permutation, balanced, "
                                     "weighted('weights.npy'), subset('ids.npy'), or an import path."),
    "data.eval": ({"test": "test"}, 'Evaluation sets: a name and a split for each; "fake()/test" is a split of another '
                                    "source."),
    "data.extra": ({}, "Extra streams for the method: a name, and a split or \"folder('crops')/train|batch_size(448)\" "
                       "for each; further options are preprocess('…') and sampling('…')."),
    "data.unreadable": ("error", "Unreadable image files in a folder: 'error' stops and lists them all, 'skip' trains "
                                 "without them."),
    "data.data_dir": ("", "Directory or bucket of prepared TFDS data; empty means ~/tensorflow_datasets."),
    "data.manual_dir": ("", "Directory of manually downloaded TFDS archives, for machines without a network."),
    "data.placement": ("host", "'host' streams batches; 'device' keeps the whole uint8 data set on the accelerator."),
    "data.threads": (0, "Number of image-decoding threads; 0 uses one per core. Batches do not depend on it."),
    "preprocess": ("decode(3)", "Host ops for training, from encoded bytes to a fixed-shape uint8 image."),
    "preprocess_eval": ("", "Host ops for evaluation and prediction, without randomness; empty means those of "
                            "`preprocess`, with resize_small and central_crop in place of random_resized_crop."),
    "augment": ("", "Device ops on the batch, with pixels in [0, 1]; evaluation skips the random ones."),
    "mix": ("", "Mixing: mixup(0.2)|cutmix(1.0) draws one of them per batch, mixup(probability=0.5) mixes half of the "
                "batches; empty means none."),
    "num_seeds": (1, "Replicas trained at once with seed, seed + 1, …; results are means with standard deviations, and "
                     "the ensemble's."),
    "tta": ("", "Test-time augmentation, averaging the logits of views: flip, translate(pad), 'flip|translate(1)'; "
                "empty means one view."),
    "model": ("cnn", "The backbone: cnn, resnet(depth=50), …, or an import path; vit(head_init='zeros') initializes "
                     "its head."),
    "batch_norm": ("global", "Which examples BatchNorm statistics cover: 'global' (SyncBatchNorm), or 'groups(32)' "
                             "(ghost: 32 examples of the batch, with all their views)."),
    "init_from": ("", "Initial weights: a work directory, a PyTorch file (.pth, .pt, .th) or a .safetensors file."),
    "init_strict": (True, "Refuse `init_from` if more than the head differs from the model; False loads what fits."),
    "loss": ("softmax", "softmax, sigmoid (a binary cross-entropy per class), focal, or an import "
                        "path."),
    "method": ("supervised", "What a run learns from a batch: supervised, distill, fixmatch, lora, mean_teacher, "
                             "simclr, supcon, or an import path. A method that trains no head refuses metrics, tta and "
                             "loss arguments."),
    "gradient": ("", "Gradient transforms: sam, asam, pgd (adversarial training), or an import path; "
                     "'sam|my_file:noisy(0.1)'."),
    "optimizer": ("adam", "An optax optimizer without its learning rate, after any transforms: "
                          "'add_decayed_weights(5e-4)|sgd'."),
    "schedule": ("constant(1e-3)", "The learning-rate schedule: constant, cosine, linear, one_cycle, step or "
                                   "triangle."),
    "clip": (0.0, "Global norm to clip the gradient to; 0 does not clip."),
    "accumulate": (1, "Number of gradient-accumulation microbatches per step; more take less memory."),
    "ema": (0.0, "Decay of the weights' exponential moving average, such as 0.999, which evaluation uses; 0: off."),
    "on_bad_step": ("stop", "A step whose loss or gradient is not finite: 'stop' the run, or 'skip' the step."),
    "rules.lr": ("", "Learning-rate multipliers by parameter path: 'backbone/.*=0.1, head/.*=1'; the first full match "
                     "wins."),
    "rules.decay": ("", "Weight-decay multipliers by parameter path; '.*(bias|scale)=0' exempts biases and norms."),
    "rules.freeze": ("", "Parameters to freeze, as patterns of full paths: 'backbone/.*'; frozen modules run in "
                         "evaluation mode."),
    "rules.shard": ("", "The axis of a parameter that fsdp shards: 'head/kernel=0, .*bias=none'; by default the "
                        "largest."),
    "rules.layer_decay": (0.0, "Layer-wise decay: a layer's learning rate over that of the layer above; 0: off."),
    "metrics": ("", "Evaluation metrics besides accuracy, loss, nll and top5: auc, balanced_accuracy, f1, 'auc|f1'."),
    "tensorboard": (True, "Write TensorBoard files next to metrics.jsonl."),
    "log_images": (False, "Write the first augmented images of step 0 to TensorBoard and `writers`."),
    "writers": ("", "Further metric writers, by import path: "
                    "'my_writers:Wandb(project=\"x\")|my_writers:Csv(\"x.csv\")'."),
    "log_every": ("50 steps", "How often to log training metrics; empty: never."),
    "eval_every": ("1 epochs", "How often to evaluate on every set of `data.eval`; empty: only at the end."),
    "checkpoint_every": ("1 epochs", "How often to save a checkpoint; empty: only at the end."),
    "watchdog": ("", "End the process if no step, batch or evaluation ends in this time, so that a cluster restarts "
                     "it: '10 min'; empty: never."),
    "check_every": ("", "How often to compute a step twice and compare every bit, to find silent data corruption: "
                        "'1000 steps'; empty: never."),
    "checkpoint.keep": (2, "How many of the latest checkpoints to keep."),
    "checkpoint.best": ("", "Also keep the best checkpoint by a metric: 'val/accuracy', 'val/nll'; your own as "
                            "'min:val/my_error'."),
}  # fmt: skip

# Keys that name exactly one thing.
_NEEDED = ("data.source", "data.train", "data.sampling", "model", "loss", "method", "schedule")

# The smallest value of a key, and the values that a key may have.
_MIN = {"batch_size": 1, "checkpoint.keep": 1, "data.threads": 0, "accumulate": 1,
          "num_seeds": 1, "clip": 0}  # fmt: skip
_CHOICES = {"precision": ("float32", "bfloat16"), "matmul_precision": ("float32", "tensorfloat32", "bfloat16"),
            "data.placement": ("host", "device"),
            "data.unreadable": ("error", "skip"), "on_bad_step": ("stop", "skip")}  # fmt: skip

# Keys of where and how a run computes: a resumed run may change them. `mesh` is among them, although another number of
# devices changes results by rounding.
LOCATION_KEYS = ("data.data_dir", "data.manual_dir", "data.placement", "data.threads", "tensorboard",
                 "log_images", "writers", "watchdog", "mesh", "rules.shard")  # fmt: skip

CADENCES = ("log_every", "eval_every", "checkpoint_every")

# Keys that no parameter depends on: a resumed run may change them, and its record then holds the new values.
FREE_KEYS = (*CADENCES, "check_every", "checkpoint.keep", "checkpoint.best", "metrics")


def free_keys(config: ConfigDict) -> tuple[str, ...]:
    """FREE_KEYS for this config: with early stopping, the last step depends on the steps that are evaluated."""
    return tuple(key for key in FREE_KEYS if not (config.stop and key == "eval_every"))


# Keys that may differ between the hosts of one run, which compare their data by fingerprint.
HOST_KEYS = ("data.data_dir", "data.manual_dir", "data.threads")

# Names that metrics.jsonl, result.json and `evaluate` use themselves, so no evaluation set can have them.
RESERVED = frozenset({"train", "step", "epochs", "seconds", "images_per_second", "params_sha256", "num_seeds",
                      "left_out", "attack", "skipped", "stopped_early", "time"})  # fmt: skip

# Whether the smallest or the greatest value of a metric is best, for those that only data with targets have.
TARGET_METRICS: dict[str, Literal["min", "max"]] = {
    "kl": "min", "mean_average_precision": "max", "micro_f1": "max", "macro_f1": "max", "exact_match": "max",
}  # fmt: skip


def default_config() -> ConfigDict:
    """Returns a config with every key at its default, which refuses unknown keys and values of other types."""
    config = ConfigDict()
    for key in KEYS:
        _set_default(config, key)
    return config.lock()


def _set_default(config: ConfigDict, key: str) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        if parent not in config:
            config[parent] = ConfigDict()
        config = config[parent]
    default = KEYS[key][0]
    config[leaf] = ConfigDict(default) if isinstance(default, dict) else default


def load_file(path_and_arg: str) -> ConfigDict:
    """Returns the config that a file's `get_config()` returns; `path.py:arg` calls `get_config(arg)`."""
    path, _, arg = path_and_arg.partition(":")
    if not Path(path).is_file():
        names = [p.stem for p in Path(path).parent.glob("*.py")]
        near = [n for n in names if Path(path).stem in n] or difflib.get_close_matches(Path(path).stem, names, 3, 0.75)
        hint = f"; did you mean {' or '.join(f'{n}.py' for n in sorted(near)[:3])}?" if near else ""
        raise UserError(f"no config file {path!r}{hint}")
    config = call(path, "get_config", arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path}: get_config() is missing, or returns {config!r}; write one that changes "
                        "default_config() and returns it")  # fmt: skip
    check_keys(config, path)
    return config.lock()


def call(path: str, function: str, arg: str) -> Any:
    """Calls a function of a Python file; None if the file has no such function."""
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {path!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    with _naming_the_line(path, module_spec.origin):
        module_spec.loader.exec_module(module)
        called = getattr(module, function, None)
        return called and called(*filter(None, [arg]))


@contextlib.contextmanager
def _naming_the_line(path: str, file: str | None) -> Iterator[None]:
    """Raises UserError for any error inside, with its last line in the config file."""
    try:
        yield
    except Exception as e:  # the user's code may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == file]
        where = f"config file {path}" + (f", line {lines[-1]}" if lines else "")
        raise UserError(f"{where}: {_explain(e)}") from e


def _explain(error: Exception) -> str:
    """An error of a config file in one line; ConfigDict's own messages for an unknown key have many."""
    text = str(error)
    if match := re.search(r'Key "(\w+)" does not exist', text):
        return unknown("config key", match[1], KEYS)
    return f"{type(error).__name__}: {next(iter(text.splitlines()), '')}"


def flatten(config: ConfigDict) -> dict[str, Value]:
    """Returns `{"data.source": …}` for every key; `data.eval` and `data.extra` stay dicts."""
    flat: dict[str, Value] = {}

    def walk(prefix: str, node: ConfigDict | Value) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if isinstance(value, ConfigDict) and key not in KEYS:
                walk(key + ".", value)
            else:
                flat[key] = value.to_dict() if isinstance(value, ConfigDict) else value

    walk("", config)
    return flat


def _wants_type(key: str, default: Value) -> str:
    return f"{key} must have the type {type(default).__name__}, such as {default!r}"


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
            raise UserError(f"{where}: {_wants_type(f'{key}={flat[key]!r}', default)}")
    for key, example in (("data.eval", "'test'"), ("data.extra", "'train[10%:]'")):
        for name, split in flat[key].items():
            if not isinstance(split, str):
                raise UserError(f"{where}: {key}.{name}={split!r} is not a split, such as {example}")


def validate(config: ConfigDict) -> None:
    """Raises UserError for values that no run can use. Specs are checked where they are built."""
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}: allowed are 0 to 2**32 - 1")
    flat = flatten(config)
    splits = {f"data.eval.{name}": split for name, split in config.data.eval.items()}
    for key, text in {**{key: flat[key] for key in _NEEDED}, **splits}.items():
        if not text.strip():
            raise UserError(f"{key} is empty; write a value, such as {KEYS[key][0] if key in KEYS else 'test'!r}")
    for key, least in _MIN.items():
        if not flat[key] >= least:  # nor is NaN
            raise UserError(f"{key}={flat[key]}: must be {least} or more")
    for key, allowed in _CHOICES.items():
        if flat[key] not in allowed:
            raise UserError(unknown(key, flat[key], allowed))
    if not 0 <= config.ema < 1:
        raise UserError(f"ema={config.ema}: allowed are 0 (off) to below 1, such as 0.999")
    if not 0 <= config.rules.layer_decay <= 1:
        raise UserError(f"rules.layer_decay={config.rules.layer_decay}: allowed are 0 (off) to 1, such as 0.75")
    for key in (*CADENCES, "check_every"):
        period(config[key], key, 1000, 10, 10)
    if config.check_every.strip() and not config.deterministic:
        raise UserError(f"check_every={config.check_every!r} compares two computations of a step, which may differ "
                        "with deterministic=False; set deterministic=True, or check_every=''")  # fmt: skip
    seconds(config.watchdog, "watchdog")
    steps = period(config.total, "total", 1000, 10)
    if steps is None or steps <= 0:
        raise UserError(f"total={config.total!r}: must be a duration above zero, such as '5 epochs'")
    if config.batch_size * config.num_seeds >= 2**31:
        raise UserError(f"batch_size={config.batch_size} with num_seeds={config.num_seeds}: a step must have fewer than"
                        " 2**31 images")  # fmt: skip
    if config.seed + config.num_seeds > 2**32:
        raise UserError(f"seed={config.seed} with num_seeds={config.num_seeds}: the last seed exceeds 2**32 - 1")
    for name in config.data.eval:
        check_set_name(name)
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


def check_set_name(name: str) -> None:
    """Raises UserError for a name that no evaluation set may have, since metrics.jsonl and result.json use it."""
    if name in RESERVED:
        why = "results use this name for something else"
    elif not re.fullmatch(r"[\w-]+", name):
        why = "allowed are letters, digits, _ and -"
    else:
        return
    raise UserError(f"data.eval names a set {name!r}: {why}; rename it, for example 'val'")


_DURATION = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?(?:e\d{1,2})?)\s*([kM]?)\s*(epochs?|steps?|examples?|%)\s*")


def period(text: str, key: str, examples: int, batch_size: int, total: int | None = None) -> Fraction | None:
    """Steps in a duration such as '5 epochs', '2000 steps', '10%' (of `total`) or '1M examples', as a fraction.

    `examples` is the size of the training split. An event of period p falls on the steps ceil(k * p), k = 1, 2, …, so
    it does not drift when an epoch is not a whole number of batches. Empty text is None: never.
    """
    if not text.strip():
        return None
    match = _DURATION.fullmatch(text)
    if not match or (match[3] == "%" and total is None):
        raise UserError(
            f"{key}={text!r} is not a duration; write '5 epochs', '2000 steps', '1M examples'"
            + ("" if total is None else " or '10%' (of the total)")
        )
    number = Fraction(match[1]) * {"": 1, "k": 1000, "M": 1_000_000}[match[2]]
    per_unit = {
        "e": Fraction(examples, batch_size) if match[3].startswith("ep") else Fraction(1, batch_size),
        "s": Fraction(1),
        "%": Fraction(total or 0, 100),
    }[match[3][0]]
    if number == 0:
        raise UserError(f"{key}={text!r}: must be above zero" + ("" if total is None else ", or empty for never"))
    return number * per_unit


def steps(text: str, key: str, examples: int, batch_size: int, total: int | None = None) -> int:
    """`period`, rounded up to whole steps; 0 for empty text."""
    fraction = period(text, key, examples, batch_size, total)
    count = math.ceil(fraction) if fraction is not None else 0
    if key == "total" and count >= 2**31:  # the step is an int32
        raise UserError(f"{key}={text!r} is {count:,} steps; a run must have fewer than 2**31")
    return count


_TIME = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(s|min|h)\s*")


def seconds(text: str, key: str) -> float:
    """The seconds of a time such as '90 s', '10 min' or '2 h'; 0 for empty text."""
    if not text.strip():
        return 0.0
    match = _TIME.fullmatch(text)
    if not match or not float(match[1]):
        raise UserError(f"{key}={text!r} is not a time above zero; write '90 s', '10 min' or '2 h'")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def is_due(step: int, every: Fraction | None) -> bool:
    """Whether an event of period `every` falls on `step`: whether ceil(k * every) == step for a whole k ≥ 1."""
    return every is not None and step // every > (step - 1) // every


def next_due(step: int, every: Fraction | None, total: int) -> int:
    """The first step after `step` on which an event of period `every` falls, at most `total`."""
    return total if every is None else min(total, math.ceil((step // every + 1) * every))


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, nested like its keys."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str | bytes, where: str) -> ConfigDict:
    """Parses a config that `to_json` wrote. Raises UserError for unknown keys and values of other types.

    Keys newer than the file get their defaults, which keep the behavior from before the key existed.
    """
    try:
        config = ConfigDict(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(
            f"{where} is damaged ({reason(e)}); restore it from a backup, or train into a new --workdir"
        ) from e
    flat = flatten(config)
    if flat and flat.keys() <= KEYS.keys() and (newer := [key for key in KEYS if key not in flat]):
        log.warning("%s is older than the config keys %s; using their defaults", where, ", ".join(newer))
        for key in newer:
            _set_default(config, key)
    check_keys(config, where)
    return config.lock()


def difference(old: ConfigDict, new: ConfigDict, without: Sequence[str] = ()) -> list[str]:
    """Returns a line "key: old → new" for each key whose value differs, except LOCATION_KEYS and `without`."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in KEYS if k not in LOCATION_KEYS and k not in without and a[k] != b[k]]
    return [f"{key}: {a[key]!r} → {b[key]!r}" for key in keys]
