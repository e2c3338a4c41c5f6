"""Sets a training run up: its data, its compiled programs, and its initial or restored state."""

import concurrent.futures
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import datasets, metrics, programs
from imgclf_jax.augment import ops
from imgclf_jax.core import jaxprs, processes, spec, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Function, Json, JsonObject, Params, PyTree
from imgclf_jax.data import stream
from imgclf_jax.data.source import Source
from imgclf_jax.models import classifier, norms
from imgclf_jax.optim import optimizers
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe
from imgclf_jax.run import early_stopping
from imgclf_jax.run.cadences import Cadences
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.digests import digest_program
from imgclf_jax.run.early_stopping import EarlyStopping
from imgclf_jax.run.provenance import take_snapshot
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import TrainState
from imgclf_jax.train import display
from imgclf_jax.train.evaluation import check_targets, open_evals
from imgclf_jax.train.leakage import initial_warnings, overlap_warnings, selection_warnings
from imgclf_jax.trained import load_teacher
from imgclf_jax.weights import pretrained

log = logging.getLogger(__name__)
_again = jax.make_user_context(False)  # part of the key of JAX's tracing caches


@dataclass(frozen=True)
class Run:
    """A run that is ready to train from step `start`."""

    config: ConfigDict
    workdir: Workdir
    images: stream.Images  # to train on
    evals: dict[str, stream.Images]
    programs: Programs
    compiled: concurrent.futures.Future[Function]  # `programs.train`
    eval_compiled: concurrent.futures.Future[Function]
    checkpoints: Checkpoints
    cadences: Cadences
    early_stopping: EarlyStopping | None
    start: int
    snapshot: JsonObject  # of this process, see `run.provenance`
    state: TrainState  # at step `start`
    sums: metrics.Sums  # since the last log

    def stops_early(self, step: int) -> str:
        """Why the run ends early at `step`, which is evaluated; "" if it trains on. All processes call this."""
        return early_stopping.find_reason(self.early_stopping, self.cadences, self.workdir.path, step)

    def record_start(self) -> None:
        """Records that the run trains on from step `start`, by which config, and where. All processes call this."""
        processes.broadcast(lambda: self.workdir.record(configs.to_json(self.config), self.snapshot, self.start))
        processes.broadcast(lambda: self.workdir.drop_result(self.start))


def set_up(config: ConfigDict, workdir: Workdir) -> Run:
    """Sets up a run in `workdir`, from its latest checkpoint or the start. Raises UserError for a user's mistake."""
    processes.broadcast(lambda: _check_config(config, workdir))

    base = datasets.open_data(config)
    images = datasets.open_train_images(config, base)
    compiling = programs.programs_for_images(config, images, load=load_teacher)
    recipe = compiling.recipe
    check_targets(compiling, images)
    evals = open_evals(compiling, base)
    compiling.check_size()
    cadences = Cadences(recipe.total, *map(recipe.period, configs.CADENCES), check=recipe.period("check_every"))
    if min(cadences.log or recipe.total, recipe.total) * config.batch_size >= 2**31:
        raise UserError(f"log_every={config.log_every!r} sums over 2**31 examples or more in int32; log more often")
    _ = compiling.traced_train, recipe.views, recipe.whole_set_metrics  # which shows errors in the config

    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint.keep, config.checkpoint.best)
    start, restored = checkpoints.restore_latest(compiling.shape) or (0, None)
    weights = pretrained.load(compiling) if config.init_from and restored is None else None
    used = [*base.values(), *(extra.source for extra in images.extra.values())]
    own = any(map(spec.names_code, (config.data.source, config.preprocess, config.preprocess_eval)))
    read = {"train": images.digest, **{f"eval.{name}": one.digest for name, one in evals.items()}} if own else {}
    snapshot = _snapshot(compiling, workdir, evals={name: one.source.fingerprint for name, one in evals.items()},
                         unreadable=sorted({file for source in used for file in source.skipped_files}), read=read,
                         **({"init_from": weights.source} if weights else {}))  # fmt: skip
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
    compiled, eval_compiled = (pool.submit(getattr, compiling, name) for name in ("train", "eval"))
    pool.shutdown(wait=False)
    if restored is not None:
        log.info("resuming at step %d of %d", start, recipe.total)
    run = restored or _initialize(compiling, images, weights.taken if weights else None)
    snapshot |= _check_purity(compiling, fresh=not start)  # while the train step compiles
    _ = compiling.traced_eval  # what fails in evaluation ends the run here
    compiling.check_best()
    if not processes.index():
        if not start:
            workdir.write_parameters(recipe.parameters)
        for sentence in _warnings(recipe, base, run["state"].params):
            log.warning("%s", sentence)
        log.info("the run:\n%s", display.head(compiling, images, evals, workdir, fresh=not start))
    patience = functools.partial(recipe.steps, "stop", total=recipe.total)
    stopping = early_stopping.build(config.stop, cadences.eval, patience)
    return Run(config, workdir, images, evals, compiling, compiled, eval_compiled, checkpoints, cadences,
               stopping, start, snapshot, run["state"], run["sums"])  # fmt: skip


def _snapshot(compiling: Programs, workdir: Workdir, **recorded: Json) -> JsonObject:
    """This start's snapshot, see `run.provenance`, in all processes. Raises UserError if the run began with others."""
    recipe, config = compiling.recipe, compiling.recipe.config
    fixed = tree.sha256(compiling.fixed) if tree.named_leaves(compiling.fixed) else ""
    processes.agree(lambda: {f"fixed arrays of method={config.method!r}": fixed})

    def take() -> JsonObject:
        keys = configs.flatten(config)
        snapshot = take_snapshot({key: keys[key] for key in ("total", *configs.FREE_KEYS)}, recipe.data,
                                 **recorded, fixed_sha256=fixed)  # fmt: skip
        workdir.check_snapshot(snapshot)
        return snapshot

    return processes.broadcast(take)


def _check_purity(compiling: Programs, fresh: bool) -> JsonObject:
    """The digests of the steps and the initialization if user code is part of them, as {"traced": …}; else {}.

    In a run that begins (`fresh`) everything is built and traced twice, and this raises UserError, naming the keys, if
    the programs differ: a number drawn or counted while tracing is a constant, and a resumed run would have another. It
    is also raised, in any run, if they call Python, as by `jax.pure_callback`: what that reads or counts, no trace
    shows. What a process computes once, or reads from a file, only changes the digest.
    """

    def trace(one: Programs) -> list[ClosedJaxpr]:
        return [traced.jaxpr for traced in (one.traced_train, one.traced_eval, one.traced_init)]

    if not (own := compiling.recipe.own_code):
        return {}
    traced = trace(compiling)
    equations = [equation for one in traced for jaxpr in jaxprs.walk(one) for equation in jaxpr.eqns]
    if called := {equation.primitive.name for equation in equations} & {"pure_callback", "io_callback"}:
        raise UserError(f"{own} calls Python by {' and '.join(sorted(called))} while the step runs, so nothing can "
                        "check that a resumed run has the same numbers; use JAX or a host op instead")  # fmt: skip
    digests = [digest_program(jaxpr) for jaxpr in traced]
    with _again(True):
        if fresh and digests != list(map(digest_program, trace(replace(compiling, recipe=replace(compiling.recipe))))):
            raise UserError(f"{own} gives another program when it is traced again, since it draws from np.random, "
                            "counts its calls or keeps other state, so a resumed run would have other numbers; draw "
                            "from the keys and rng streams that it gets")  # fmt: skip
    processes.agree(lambda: {"the traced train step": digests[0]})
    return {"traced": dict(zip(("train", "eval", "init"), digests, strict=True))}


def _initialize(compiling: Programs, images: stream.Images, weights: dict[str, np.ndarray] | None) -> PyTree:
    """The state and metric accumulator of step 0, with the parameters of `weights` where there are any."""
    recipe = compiling.recipe
    if recipe.rules:
        log.info("rules:\n%s", recipe.rules.table(recipe.parameters))
    return {"state": compiling.init_state(compiling.first_images(images), weights), "sums": compiling.zero_sums()}


def _warnings(recipe: Recipe, base: Mapping[str, Source], params: Params) -> Iterator[str]:
    """Yields a sentence for each setting that is probably a mistake."""
    config = recipe.config
    yield from overlap_warnings(config, config.data, base)
    yield from initial_warnings(config, base)
    yield from selection_warnings(config)
    build = functools.partial(classifier.build, config.model, len(recipe.data.class_names))
    # By `repr`, since a backbone's fields may be arrays.
    if config.precision != "float32" and repr(build(config.precision).backbone) == repr(build("float32").backbone):
        yield f"precision={config.precision!r} does not reach model={config.model!r}, which takes no dtype or sets it"
    if spec.names_code(config.optimizer) and optimizers.ignores_learning_rate(config.optimizer, params):
        yield f"optimizer={config.optimizer!r} ignores its learning_rate: the schedule, and the rate logged, do nothing"
    if ops.divides_twice(config.augment, recipe.data.image_shape):
        yield f"augment={config.augment!r}: an op before normalize returns 0 to 1, and normalize divides by 255 again"
    if config.batch_norm != "global" and norms.uses_linen_batch_norm(recipe.model, recipe.data.image_shape):
        yield f"batch_norm={config.batch_norm!r} does not reach linen's BatchNorm; use that of imgclf_jax.models.norms"
    if recipe.method.freeze and not config.init_from:
        yield f"method={config.method!r} freezes random weights; name the run or file to load by init_from"


def _check_config(config: ConfigDict, workdir: Workdir) -> None:
    """Raises UserError, naming the keys, if the run in `workdir` has another config, its free keys aside."""
    if not workdir.config.is_file():
        if workdir.last_checkpoint() is not None:
            raise UserError(f"{workdir.config} is missing beside checkpoints; restore it, or pass another --workdir")
    elif lines := configs.difference(workdir.load_config(), config, configs.free_keys(config)):
        raise UserError(f"{workdir.path} holds a run with another config ({'; '.join(lines)}); use the old values, or "
                        "pass another --workdir, with init_from for the weights of this run")  # fmt: skip
