"""Sets a training run up: its data, its compiled programs, and its initial or restored state."""

import concurrent.futures
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import datasets, losses, metrics, programs
from imgclf_jax.core import processes, spec, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function, JsonObject
from imgclf_jax.data import stream
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run import early_stopping, writers
from imgclf_jax.run.cadences import Cadences
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.early_stopping import EarlyStopping
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import TrainState
from imgclf_jax.train import display, extension
from imgclf_jax.train.evaluation import check_targets, open_evals
from imgclf_jax.train.leakage import initial_warnings, overlap_warnings, selection_warnings
from imgclf_jax.train.unseen_classes import unseen_class_warnings
from imgclf_jax.trained import load_teacher
from imgclf_jax.weights import pretrained

log = logging.getLogger(__name__)

_MAX_TRIED = 2**22  # probabilities of random predictions, which metrics are called with before the run


@dataclass(frozen=True)
class Run:
    """A run that is ready to train from step `start`."""

    config: ConfigDict
    workdir: Workdir
    images: stream.Images  # to train on
    evals: dict[str, stream.Images]
    programs: Programs
    compiled: concurrent.futures.Future[float]  # seconds of tracing and compiling `programs.train`
    eval_compiled: concurrent.futures.Future[Function]
    checkpoints: Checkpoints
    cadences: Cadences
    early_stopping: EarlyStopping | None
    rows: display.Rows  # of the log
    start: int
    changed: bool  # whether config.json has another config; it gets this one once a step is trained by it
    extended: bool  # whether config.json has another total
    snapshot: JsonObject  # of this process, see `run.provenance`
    state: TrainState  # at step `start`
    sums: metrics.Sums  # since the last log

    def stops_early(self, step: int) -> str:
        """Why the run ends early at `step`, which is evaluated; "" if it trains on. All processes call this."""
        return early_stopping.find_reason(self.early_stopping, self.cadences, self.workdir.path, step)

    def record_start(self) -> None:
        """Records that the run trains on from step `start`, by which config, and where. All processes call this."""

        def record() -> None:
            self.workdir.record(self.config, self.snapshot, self.start)
            self.workdir.drop_later_result(self.start)

        processes.broadcast(record)


def set_up(config: ConfigDict, workdir: Workdir, extend: bool = False) -> Run:
    """Sets up the run of `config` in `workdir`, from its latest checkpoint or from the start.

    With `extend`, the run in `workdir` may have another `total`. Raises UserError for a user's mistake.
    """
    programs.check(config)
    if not processes.index():
        writers.find_factories(config.writers)  # a wrong spec ends the run before it reads data
    may_differ = ("total",) if extend else ()
    before = processes.broadcast(lambda: workdir.check_config(config, may_differ))

    base = datasets.open_data(config)
    images = datasets.open_train_images(config, base)
    compiling = programs.programs_for_images(_pinned(config, workdir), images, load=load_teacher)
    recipe = compiling.recipe
    check_targets(compiling, images)
    compiling.check_best()
    evals = open_evals(compiling, base)
    compiling.check_size()
    cadences = Cadences(recipe.total, *map(recipe.period, configs.CADENCES), check=recipe.period("check_every"))
    if min(cadences.total, cadences.log or math.inf) * config.batch_size >= 2**31:
        raise UserError(f"log_every={config.log_every!r}: training metrics are sums over fewer than 2**31 examples; "
                        "log more often")  # fmt: skip

    tracing = _trace(compiling)
    _try_metrics(recipe, evals)
    fresh = not processes.broadcast(workdir.has_checkpoints)
    weights = pretrained.load(compiling) if config.init_from and fresh else None
    compiled, eval_compiled = _compile_in_background(compiling, tracing)
    skipped = datasets.skipped_files(base, images)
    fingerprints = {name: images.source.fingerprint for name, images in evals.items()}
    groups = compiling.groups_of_statistics if config.batch_norm == "per_device" else 0
    fixed = tree.sha256(compiling.fixed) if tree.named_leaves(compiling.fixed) else ""
    processes.agree(lambda: {f"fixed arrays of method={config.method!r}": fixed})

    def take_snapshot() -> JsonObject:
        source = {"init_from": weights.source} if weights else {}
        return workdir.take_snapshot(config, recipe.data, evals=fingerprints, unreadable=skipped,
                                     fixed_sha256=fixed, batch_norm_groups=groups, **source)  # fmt: skip

    snapshot = processes.broadcast(take_snapshot)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint.keep, config.checkpoint.best)
    start, run = checkpoints.restore_latest(compiling.shape) or (0, None)
    if run is None:
        if config.init_from and weights is None:  # a bucket keeps the folder of a checkpoint that was never complete
            weights = pretrained.load(compiling)
            snapshot = processes.broadcast(take_snapshot)
        run = compiling.init(images=compiling.first_images(images), weights=weights.taken if weights else None)
        if not processes.index():
            workdir.write_parameters(recipe.parameters)
        if recipe.rules:
            log.info("rules:\n%s", recipe.rules.table(recipe.parameters))
    else:
        log.info("resuming at step %d of %d", start, recipe.total)
    old = configs.from_json(before, str(workdir.config)) if before else config
    if old.total != config.total:
        extension.check(Recipe(old, recipe.data), recipe, start, workdir.path)
    if processes.broadcast(lambda: not workdir.has_records()):
        processes.broadcast(lambda: workdir.record(config, snapshot, start))
    for sentence in () if processes.index() else _warnings(recipe, images, evals, base):
        log.warning("%s", sentence)
    _ = compiling.traced_eval  # traced while the train step compiles: what fails in evaluation ends the run here
    early = early_stopping.build(config, recipe.patience)
    rows = display.make_rows(recipe, images, workdir, start)
    if not processes.index():
        log.info("the run:\n%s", display.head(compiling, images, base, workdir, fresh=not start))
    return Run(config, workdir, images, evals, compiling, compiled, eval_compiled, checkpoints, cadences, early, rows,
               start, bool(before), old.total != config.total, snapshot, run["state"], run["sums"])  # fmt: skip


def _warnings(
    recipe: Recipe, images: stream.Images, evals: dict[str, stream.Images], base: datasets.Splits
) -> Iterator[str]:
    """Yields a sentence for each setting that is probably a mistake."""
    config = recipe.config
    yield from overlap_warnings(config, config.data, base)
    yield from initial_warnings(config, base)
    if recipe.method.predicts:
        yield from unseen_class_warnings(images, evals)
    yield from selection_warnings(config)
    if losses.needs_class_counts(config.loss) and spec.parse_one(config.data.sampling).name != "permutation":
        yield (f"loss={config.loss!r} weights the classes by their numbers in data.train, but "
               f"data.sampling={config.data.sampling!r} draws them in other proportions: they are balanced twice; drop "
               "one of the two")  # fmt: skip
    if config.data.extra and recipe.supervised:
        yield f"method={config.method!r} reads no stream of data.extra: {', '.join(sorted(config.data.extra))}"
    if recipe.method.freeze and not config.init_from:
        yield (f"method={config.method!r} freezes weights that are random without init_from; name the run or file to "
               "load them from")  # fmt: skip


def _pinned(config: ConfigDict, workdir: Workdir) -> ConfigDict:
    """The config to compile. With `batch_norm='per_device'` it keeps the groups of the devices the run began on."""
    text = processes.broadcast(lambda: workdir.pin_groups(config).batch_norm)
    if text != config.batch_norm:
        log.info("batch_norm=%r is %s, as on the devices that the run began on", config.batch_norm, text)
        config = config.copy_and_resolve_references()
        config.batch_norm = text
    return config


def _trace(compiling: Programs) -> float:
    """Traces the train step, which shows errors in the config; returns the seconds it took."""
    began = time.perf_counter()
    _ = compiling.traced_train, compiling.recipe.views, compiling.recipe.whole_set_metrics
    return time.perf_counter() - began


def _try_metrics(recipe: Recipe, evals: dict[str, stream.Images]) -> None:
    """Calls the user's metrics on random predictions of each evaluation set, so that a wrong one fails at once.

    Of a set that would take too long they get a part, and may fail for lack of the rest.
    """
    calls = [call.name for call in spec.parse(recipe.config.metrics) if ":" in call.name]
    own = [recipe.whole_set_metrics[name.rpartition(":")[2]] for name in calls]
    classes, draw = len(recipe.data.class_names), np.random.default_rng(0)
    for images in evals.values() if own else ():
        n = min(len(images), _MAX_TRIED // classes)
        outputs = draw.random((n, classes), np.float32)
        wanted = draw.integers(2, size=outputs.shape).astype(np.float32)
        if recipe.task in (losses.Task.CLASSES, losses.Task.SOFT):
            outputs /= outputs.sum(1, keepdims=True)
            wanted = (draw.permutation(n) % classes).astype(np.int32)
        for metric in own:
            try:
                metric((wanted, outputs))
            except Exception as e:
                if isinstance(e, UserError) or n == len(images):
                    raise


def _compile_in_background(
    compiling: Programs, tracing: float
) -> tuple[concurrent.futures.Future[float], concurrent.futures.Future[Function]]:
    """Compiles the train and eval programs in a thread; the first future holds the seconds, with those of tracing."""

    def compile() -> float:
        began = time.perf_counter()
        _ = compiling.train
        return tracing + time.perf_counter() - began

    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
    futures = pool.submit(compile), pool.submit(lambda: compiling.eval)
    pool.shutdown(wait=False)
    return futures
