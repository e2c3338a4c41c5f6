"""The configuration: every key, its default, its documentation, and the notation for durations.

A config file imports this module alone: `get_config()` starts from `default_config()` and changes what differs.
"""

import difflib
import importlib.util
import json
import logging
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax.core.errors import UserError, reason, unknown
from imgclf_jax.core.split_folders import split_folders as split_folders

log = logging.getLogger(__name__)

# Every key, its default, whose type is the key's, and what it means.
KEYS: dict[str, tuple[Any, str]] = {
    "seed": (0, "The number from which every random draw derives; 0 to 2**32 - 1."),
    "total": ("20 epochs", "How long to train: 'N epochs', 'N steps' or 'N examples' (5k, 1M)."),
    "batch_size": (128, "Examples a step, over all devices and hosts; divisible by the number of devices."),
    "precision": ("float32", "What layers compute in: 'float32' or 'bfloat16'. Parameters and logits stay float32."),
    "matmul_precision": (
        "float32",
        "Precision of float32 matmuls on TPU and GPU: 'float32', 'tensorfloat32' or 'bfloat16'.",
    ),
    "deterministic": (True, "Ask XLA for deterministic GPU kernels, so that a repeated run gives the same bits."),
    "steps_per_call": (0, "Steps in a call of the compiled program, at most; 0: chosen by size. Changes no result."),
    "mesh": (
        "data=-1",
        "The device mesh: 'data=-1, fsdp=4' shards the train state, 'seeds=4, data=-1' the seeds; -1: the rest.",
    ),
    "shard": (
        "all",
        "What fsdp shards: 'all' (parameters, optimizer state, averages), or the state of the 'optimizer' alone.",
    ),
    "data.source": (
        "digits",
        "digits, tfds('name'), folder('path'), table('labels.csv'), arrays('file.npz') or fake(n, shape, classes).",
    ),
    "data.train": ("train", "The split to train on, in TFDS syntax: 'train[:90%]', 'train[1000:]+extra'."),
    "data.sampling": (
        "permutation",
        "Which example stands where in the stream: permutation, balanced, weighted('weights.npy'), repeated(3), "
        "curriculum('scores.npz'), subset('ids.npy'), or an import path.",
    ),
    "data.eval": ({"test": "test"}, 'Evaluation sets: a name and a split for each; of another source "fake()/test".'),
    "data.extra": (
        {},
        "Further streams for a method to read: a name, and a split or \"folder('crops')/train|batch_size(448)\" for "
        "each; the options preprocess('…') and sampling('…') too.",
    ),
    "data.unreadable": (
        "error",
        "Image files of a folder that cannot be read: 'error' stops and lists them all, 'skip' trains without them.",
    ),
    "data.data_dir": ("", "Where TFDS keeps prepared data, a bucket too; empty: ~/tensorflow_datasets."),
    "data.manual_dir": ("", "Original files already downloaded, for machines without a network (TFDS)."),
    "data.placement": ("host", "'host' streams batches; 'device' keeps the whole uint8 set on the accelerator."),
    "data.threads": (0, "Threads that decode images; 0: one for each core. Batches do not depend on it."),
    "preprocess": ("decode(3)", "Host ops, bytes to a fixed-shape uint8 image, for training."),
    "preprocess_eval": (
        "",
        "Host ops for evaluation and prediction, which draw nothing at random; empty: those of `preprocess`, where "
        "resize_small and central_crop take the place of random_resized_crop.",
    ),
    "augment": ("", "Device ops on the batch; those that draw at random are left out in evaluation. Scaled to [0, 1]."),
    "mix": (
        "",
        "mixup(0.2)|cutmix(1.0): one of them for each batch; mixup(probability=0.5): on half of them; empty: none.",
    ),
    "num_seeds": (1, "Replicas trained at once, of seed, seed + 1, …: results with deviations, and the ensemble's."),
    "tta": ("", "Views whose logits evaluation averages: flip, translate(pad), 'flip|translate(1)'; empty: one view."),
    "model": (
        "cnn",
        "The backbone: cnn, resnet(depth=50), …, or an import path; vit(head_init='zeros') is how its head begins.",
    ),
    "batch_norm": (
        "global",
        "Examples that BatchNorm statistics cover: 'global' (SyncBatchNorm), 'per_device', 'groups(32)' (ghost).",
    ),
    "init_from": ("", "Weights to start from: a work directory, a PyTorch file (.pth, .pt, .th) or a .safetensors."),
    "init_strict": (True, "Refuse `init_from` if more than the head differs from the model; False: take what fits."),
    "loss": (
        "softmax",
        "softmax, sigmoid (binary cross-entropies; probabilities of each class by itself), focal, or an import path.",
    ),
    "method": (
        "supervised",
        "What a run learns from a batch: supervised, distill, fixmatch, lora, mean_teacher, simclr, supcon, or an "
        "import path. With a method that trains no head, metrics, tta and arguments of loss are refused.",
    ),
    "gradient": (
        "",
        "Functions of the gradient: sam, asam, pgd (adversarial training), an import path; 'sam|my_file:noisy(0.1)'.",
    ),
    "optimizer": (
        "adam",
        "An optax optimizer, without its rate, after any transforms: 'add_decayed_weights(5e-4)|sgd'.",
    ),
    "schedule": (
        "constant(1e-3)",
        "The learning rate: constant, cosine, linear, one_cycle, step or triangle.",
    ),
    "clip": (0.0, "The greatest global norm of the gradient; 0: not clipped."),
    "accumulate": (1, "Number of gradient-accumulation microbatches per step; each takes that much less memory."),
    "ema": (0.0, "Decay of the average of the weights that evaluation uses, such as 0.999; 0: the weights themselves."),
    "rules.lr": ("", "Learning rates by parameter: 'backbone/.*=0.1, head/.*=1', patterns of whole paths, first wins."),
    "rules.decay": ("", "The same for weight decay; '.*(bias|scale)=0' leaves out biases and normalizations."),
    "rules.freeze": (
        "",
        "Parameters not trained, as patterns of whole paths: 'backbone/.*'; their modules run as in evaluation.",
    ),
    "rules.shard": (
        "",
        "The axis along which a parameter is split over fsdp: 'head/kernel=0, .*bias=none'; else the largest.",
    ),
    "rules.layer_decay": (0.0, "The learning rate of each layer as a fraction of that of the layer above; 0: off."),
    "metrics": ("", "Metrics of evaluation beside accuracy, loss, nll and top5: auc, balanced_accuracy, f1, 'auc|f1'."),
    "tensorboard": (True, "Write TensorBoard's files beside metrics.jsonl."),
    "writers": (
        "",
        'More writers of metrics, by import path: \'my_writers:Wandb(project="x")|my_writers:Csv("x.csv")\'.',
    ),
    "log_every": ("50 steps", "How often training metrics are written; empty: never."),
    "eval_every": ("1 epochs", "How often all of `data.eval` is evaluated; empty: at the end only."),
    "checkpoint_every": ("1 epochs", "How often a checkpoint is saved; empty: at the end only."),
    "checkpoint.keep": (2, "How many of the latest checkpoints are kept."),
    "checkpoint.best": (
        "",
        "A metric whose best checkpoint is kept too: 'val/accuracy', 'val/nll'; your own as 'min:val/my_error'.",
    ),
}

# Keys that say where and how and not what is computed: a run may be resumed with other values of these.
# `mesh` and `shard` among them: another number of devices changes results by rounding too.
LOCATION_KEYS = ("data.data_dir", "data.manual_dir", "data.placement", "data.threads", "steps_per_call", "tensorboard",
                 "writers", "mesh", "shard", "rules.shard")  # fmt: skip

# Keys that say how often something happens.
CADENCES = ("log_every", "eval_every", "checkpoint_every")

# Keys that no bit of the parameters follows from: a resumed run may have other values, which its record then says.
FREE_KEYS = (*CADENCES, "checkpoint.keep", "checkpoint.best", "metrics")

# Keys that may differ between the hosts of one run: the data are compared by their fingerprint.
OF_THE_HOST = ("data.data_dir", "data.manual_dir", "data.threads")

# What no evaluation set may be called: metrics.jsonl, result.json and `evaluate` have these names beside those of sets.
RESERVED = frozenset(
    {"train", "step", "epochs", "seconds", "images_per_second", "params_sha256", "num_seeds", "left_out"}
)

# What evaluation reports of data with targets: see `metrics.OF_TASK`.
METRICS_OF_TARGETS = (
    "kl", "mean_average_precision", "micro_f1", "macro_f1", "exact_match", "r2", "mae", "rmse",
)  # fmt: skip

_MOST_BYTES = 1 << 20  # of a config as JSON, in which the longest values are specs


def default_config() -> ConfigDict:
    """All keys at their defaults, types locked, unknown keys refused."""
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
    """The config that `get_config` of a file gives; `path.py:arg` passes `arg` to it."""
    path, _, arg = path_and_arg.partition(":")
    if not Path(path).is_file():
        names = [p.stem for p in Path(path).parent.glob("*.py")]
        near = [n for n in names if Path(path).stem in n] or difflib.get_close_matches(Path(path).stem, names, 3, 0.75)
        hint = f"; did you mean {' or '.join(f'{n}.py' for n in sorted(near)[:3])}?" if near else ""
        raise UserError(f"no config file {path!r}{hint}")
    config = _call(path, "get_config", arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"config file {path}: get_config gives {config!r}; it must return a config (default_config())")
    check_keys(config, path)
    return config.lock()


def load_sweep(path_and_arg: str) -> list[dict[str, Any]] | None:
    """The runs that `get_sweep` of a config file plans, by the keys that each sets; None if it has no such function.

    `path.py:arg` passes `arg` to it. Raises UserError if it gives anything else than a list of such dicts, or none.
    """
    path, _, arg = path_and_arg.partition(":")
    runs = _call(path, "get_sweep", arg)
    if runs is _ABSENT:
        return None
    try:
        plan = [dict(run) for run in runs]
        if plan and all(isinstance(key, str) for run in plan for key in run):
            return plan
    except (TypeError, ValueError):
        pass
    raise UserError(f"config file {path}: get_sweep gives {runs!r}; it must return a list of dicts, such as "
                    "[{'seed': 0}, {'seed': 1}]")  # fmt: skip


_ABSENT = object()


def _call(path: str, function: str, arg: str) -> Any:
    """What a function of a Python file gives; _ABSENT if the file has no such function, unless it is get_config."""
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {path!r} is not a Python file (.py)")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if function != "get_config" and not hasattr(module, function):
            return _ABSENT
        called = getattr(module, function)
        return called(arg) if arg else called()
    except Exception as e:  # whatever the user's own code raises
        if match := re.search(r'Key "(\w+)" does not exist', str(e)):  # ConfigDict's own text runs over many lines
            raise UserError(f"config file {path}: " + unknown("config key", match[1], KEYS)) from e
        raise UserError(f"config file {path}: {type(e).__name__}: {next(iter(str(e).splitlines()), '')}") from e


def flatten(config: ConfigDict) -> dict[str, Any]:
    """`{"data.source": …}` for every key; `data.eval` stays one value, a dict of split names."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        for name, value in node.items():
            key = f"{prefix}{name}"
            if isinstance(value, ConfigDict) and key not in KEYS:
                walk(key + ".", value)
            else:
                flat[key] = value.to_dict() if isinstance(value, ConfigDict) else value

    walk("", config)
    return flat


def check_keys(config: ConfigDict, where: str) -> None:
    """Raises UserError for a key that does not exist, one that is missing, or a value of another type."""
    flat = flatten(config)
    for key in flat:
        if key not in KEYS:
            raise UserError(f"{where}: " + unknown("config key", key, KEYS))
    if missing := [key for key in KEYS if key not in flat]:
        raise UserError(f"{where}: missing config keys {', '.join(missing)}; start from default_config()")
    for key, (default, _) in KEYS.items():
        if type(flat[key]) is not type(default):
            raise UserError(f"{where}: {key}={flat[key]!r} is not of type {type(default).__name__}, as {default!r} is")
    for key, example in (("data.eval", "'test'"), ("data.extra", "'train[10%:]'")):
        for name, split in flat[key].items():
            if not isinstance(split, str):
                raise UserError(f"{where}: {key}.{name}={split!r} is not a split, such as {example}")


def validate(config: ConfigDict) -> None:
    """Raises UserError for values that no run could use. Specs are checked where they are built."""
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed}: allowed are 0 to 2**32 - 1")
    for key, least in (
        ("batch_size", 1),
        ("checkpoint.keep", 1),
        ("data.threads", 0),
        ("steps_per_call", 0),
        ("accumulate", 1),
        ("num_seeds", 1),
        ("clip", 0),
    ):
        if not flatten(config)[key] >= least:  # nor is NaN
            raise UserError(f"{key}={flatten(config)[key]}: must be {least} or more")
    for key, allowed in (
        ("precision", ("float32", "bfloat16")),
        ("data.placement", ("host", "device")),
        ("data.unreadable", ("error", "skip")),
    ):
        if (value := flatten(config)[key]) not in allowed:
            raise UserError(unknown(key, value, allowed))
    if not 0 <= config.ema < 1:
        raise UserError(f"ema={config.ema}: allowed are 0 (off) to below 1, such as 0.999")
    if not 0 <= config.rules.layer_decay <= 1:
        raise UserError(f"rules.layer_decay={config.rules.layer_decay}: allowed are 0 (off) to 1, such as 0.75")
    for key in CADENCES:
        period(config[key], key, 1000, 10, 10)
    steps = period(config.total, "total", 1000, 10)
    if steps is None or steps <= 0:
        raise UserError(f"total={config.total!r}: must be a duration above zero, such as '5 epochs'")
    if config.batch_size * config.num_seeds >= 2**31:
        raise UserError(f"batch_size={config.batch_size} with num_seeds={config.num_seeds}: a step has fewer than 2**31"
                        " images")  # fmt: skip
    if config.seed + config.num_seeds > 2**32:
        raise UserError(f"seed={config.seed} and num_seeds={config.num_seeds} go beyond the seeds, 0 to 2**32 - 1")
    for name in config.data.eval:
        check_set_name(name)
    more = [text.partition("(")[0].rpartition(":")[2].strip() for text in config.metrics.split("|")]
    kinds = ("accuracy", "loss", "nll", "top5", *filter(None, more))
    known = [f"{name}/{kind}" for name in config.data.eval for kind in kinds]
    best = re.sub("^(min|max):", "", config.checkpoint.best)
    name, _, kind = best.partition("/")
    # Those of a task, and of a method's own, which min: or max: stands before, are checked once the data are known.
    later = kind.partition("[")[0] in METRICS_OF_TARGETS or (
        best != config.checkpoint.best and config.method != KEYS["method"][0]
    )
    if config.checkpoint.best and best not in known and not (name in config.data.eval and later):
        raise UserError(unknown("metric in checkpoint.best", best, known))


def check_set_name(name: str) -> None:
    """Raises UserError for a name that no evaluation set may have: it stands in metrics.jsonl and in result.json."""
    if name in RESERVED:
        why = f"results have something else called {name!r}"
    elif not re.fullmatch(r"[\w-]+", name):
        why = "allowed are letters, digits, _ and -"
    else:
        return
    raise UserError(f"data.eval has a set called {name!r}: {why}; give it another name, such as 'val'")


_DURATION = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?(?:e\d{1,2})?)\s*([kM]?)\s*(epochs?|steps?|examples?|%)\s*")


def period(text: str, key: str, examples: int, batch_size: int, total: int | None = None) -> Fraction | None:
    """Steps in a duration such as '5 epochs', '2000 steps', '10%' (of `total`) or '1M examples', as a fraction.

    `examples` is the size of the training split. An event with period p happens at each step ceil(k * p), k = 1,
    2, …, so epochs that hold no whole number of batches drift nowhere. Empty text is None: never.
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
    """`period`, rounded up to whole steps; 0 for the empty text."""
    fraction = period(text, key, examples, batch_size, total)
    count = math.ceil(fraction) if fraction is not None else 0
    if key == "total" and count >= 2**31:  # the number of a step is an int32
        raise UserError(f"{key}={text!r} is {count:,} steps; a run has fewer than 2**31")
    return count


def is_due(step: int, every: Fraction | None) -> bool:
    """Whether an event of period `every` falls on `step`: whether ceil(k * every) == step for a whole k ≥ 1."""
    return every is not None and step // every > (step - 1) // every


def next_due(step: int, every: Fraction | None, total: int) -> int:
    """The first step after `step` on which an event of period `every` falls, but `total` at the latest."""
    return total if every is None else min(total, math.ceil((step // every + 1) * every))


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON, nested as its keys are."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str | bytes, where: str) -> ConfigDict:
    """The config that `to_json` wrote; other keys than KEYS, and other types than theirs, are refused.

    Keys that are newer than the file get their defaults, under which a run does what it did before there was the key.
    """
    if len(text) > _MOST_BYTES:
        raise UserError(f"{where} has {len(text):,} bytes, and a config at most {_MOST_BYTES:,}")
    try:
        config = ConfigDict(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(
            f"{where} is damaged ({reason(e)}); restore it from a backup, or train into a new --workdir"
        ) from e
    flat = flatten(config)
    if flat and flat.keys() <= KEYS.keys() and (newer := [key for key in KEYS if key not in flat]):
        log.warning("%s was written before there were %s: their defaults are used", where, ", ".join(newer))
        for key in newer:
            _set_default(config, key)
    check_keys(config, where)
    return config.lock()


def difference(old: ConfigDict, new: ConfigDict, without: Sequence[str] = ()) -> list[str]:
    """A line for each key whose value differs, other than LOCATION_KEYS and the keys `without`."""
    a, b = flatten(old), flatten(new)
    keys = [k for k in KEYS if k not in LOCATION_KEYS and k not in without and a[k] != b[k]]
    return [f"{key}: {a[key]!r} → {b[key]!r}" for key in keys]
