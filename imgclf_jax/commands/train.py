"""The training loop. It reads top to bottom; the functions it calls are pure, and only the loop does I/O."""

import collections
import concurrent.futures
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax import metrics
from imgclf_jax.commands.evaluate import evaluate_all, open_evals
from imgclf_jax.core import sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import placement, sources, stream
from imgclf_jax.programs import Programs, of_images
from imgclf_jax.run import provenance, writers
from imgclf_jax.run.checkpoint import Checkpoints
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.weights import pretrained

log = logging.getLogger(__name__)

STOPPED = 75  # EX_TEMPFAIL: stopped by a signal with a checkpoint saved; run the same command again


def main(config: ConfigDict, workdir: Workdir, profile: tuple[int, int] | None = None) -> int:
    """The command `train`: trains, or resumes, the run in `workdir`; 0 when done, 75 when stopped by a signal.

    `profile` traces the steps from its first to its second (exclusive). Raises UserError for what is the user's to
    mend and for a loss that is not finite.
    """
    began = time.perf_counter()
    sharding.check_batch_size(config.batch_size, sharding.make_mesh(), config.accumulate)
    workdir.open_for_training(config)

    # The data, and what the config describes.
    base = sources.open_splits(config.data.source, config.data.data_dir, config.data.manual_dir)
    train_source = sources.take_split(base, config.data.train)
    images = stream.Images(train_source, config.preprocess, config.seed, config.data.threads)
    programs = of_images(config, images)
    recipe, mesh = programs.recipe, programs.mesh
    evals = open_evals(programs, base)
    total = recipe.total
    log_every, eval_every, checkpoint_every = map(recipe.period, configs.CADENCES)
    tracing = _trace(programs)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint.keep, config.checkpoint.best)
    weights = pretrained.load(programs) if config.init_from and not checkpoints.steps() else None
    compiled = _compile_in_background(programs, tracing)
    workdir.record(config, recipe.data, weights.source if weights else None)

    # The state: the latest checkpoint's, or the first.
    start, run = checkpoints.restore_latest(programs.shape) or (0, None)
    if run is None:
        run = programs.init(None, programs.first_images(images), weights.taken if weights else None)
        _log_parameters(run["state"].params, recipe.num_seeds)
        if recipe.rules:
            log.info("rules:\n%s", recipe.rules.table(recipe.parameters))
    else:
        log.info("resuming at step %d of %d", start, total)
    state, sums = run["state"], run["sums"]
    log.info(
        "%d examples of %s, %d classes, %d steps of %d on %d %s device%s", len(images), list(images.shape),
        len(recipe.data.class_names), total, config.batch_size, mesh.size, programs.platform, "s" * (mesh.size > 1),
    )  # fmt: skip

    if start == total and workdir.result.is_file():
        log.info("this run is done; its result is in %s", workdir.result)
        return 0

    writer = writers.MetricsWriter(workdir.path, start, config.tensorboard)
    progress = writers.Progress(start, total)
    throughput = writers.Throughput(config.batch_size * config.num_seeds)
    in_flight: collections.deque[Any] = collections.deque()
    results: dict[str, Any] = {}
    traced = (max(profile[0], start), min(profile[1], total)) if profile else (-1, -1)
    if traced[0] >= traced[1] and profile:
        log.warning("--profile=%d:%d lies outside of the steps %d to %d: nothing is traced", *profile, start, total)
        traced = (-1, -1)

    with contextlib.ExitStack() as stack:
        stopped = stack.enter_context(_stop_signals())
        stack.callback(writer.close)
        stack.callback(progress.close)
        size = programs.steps_per_call
        ranges = _ranges(start, total, size, (log_every, eval_every, checkpoint_every), traced)
        chunks = placement.train_chunks(
            config.data.placement, images, mesh, config.seed, config.batch_size, ranges, size, recipe.with_ids,
            config.num_seeds,
        )  # fmt: skip
        for first, done in ranges:
            if first == traced[0]:
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(workdir.path / "profile"), create_perfetto_trace=True)
            before = time.perf_counter()
            chunk = next(chunks)
            idle = not in_flight or in_flight[-1].is_ready()  # else the device had work all the while
            throughput.count_steps(done - first, waited=time.perf_counter() - before if idle else 0.0)
            if first == start:
                log.info("compiled in %.2f s, beside other work; the first step begins %.2f s after the command",
                         compiled.result(), time.perf_counter() - began)  # fmt: skip
                throughput.restart()

            state, sums = programs.train(state, sums, chunk, np.int32(done - first))

            in_flight.append(sums["steps"])
            if len(in_flight) > 2:  # the host runs ahead of the device, but not without end
                in_flight.popleft().block_until_ready()
            progress.update(done)
            if done == traced[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                log.info("steps %d to %d traced into %s", *traced, workdir.path / "profile")

            last = done == total
            received = stopped()  # looked up once: a signal from here on waits for the next chunk, and its checkpoint
            log_due = last or configs.is_due(done, log_every)
            eval_due = last or configs.is_due(done, eval_every)
            save_due = last or configs.is_due(done, checkpoint_every) or received is not None
            if not (log_due or eval_due or save_due):
                continue

            host_sums = jax.device_get(sums)  # waits for the device
            checkpoints.poll()
            throughput.pause()
            _check_finite(host_sums, programs, images, workdir, checkpoints)
            if log_due:
                record = _train_record(host_sums) | throughput.lap()
                writer.write(done, {f"train/{name}": value for name, value in record.items()})
                brief = {name: record[name] for name in ("loss", "accuracy", "images_per_second", "input_wait")}
                log.info("step %d: train %s", done, writers.format_metrics(brief))
                pace = f"{record['images_per_second']:.0f} images/s, {record['input_wait']:.0%} waiting for input"
                progress.update(done, pace)
                sums = programs.zero_sums()
            scores: dict[str, float] = {}
            if eval_due:
                results = evaluate_all(programs, state, evals)
                for name, values in results.items():
                    log.info("step %d: %s %s", done, name, writers.format_metrics(values))
                scores = {f"{name}/{key}": v for name, values in results.items() for key, v in values.items()}
                writer.write(done, scores)
            if save_due or (eval_due and config.checkpoint.best):
                writer.sync()  # so that no checkpoint on disk is ahead of its metrics
                checkpoints.save(done, {"state": state, "sums": sums}, scores)
            if received and not last:
                checkpoints.close()
                log.warning("%s: stopped at step %d, checkpoint saved; run the same command to go on", received, done)
                return STOPPED
            throughput.resume()
        checkpoints.close()

    results = results or evaluate_all(programs, state, evals)
    trained = throughput.steps * config.batch_size * config.num_seeds  # images
    result = {
        "step": total,
        "epochs": round(total * config.batch_size / len(images), 4),
        "seconds": round(time.perf_counter() - began, 2),  # of this process, from the start of `main`
        "images_per_second": round(trained / max(throughput.seconds, 1e-9), 1),
        "params_sha256": tree.sha256(jax.device_get(state.params)),
        **results,
    }
    provenance.write_json(workdir.result, result)
    for name, values in results.items():
        print(f"{name}: {writers.format_metrics(values)}")
    print(f"trained {total} steps ({result['epochs']:g} epochs) in {result['seconds']} s; see {workdir.path}")
    return 0


def _trace(programs: Programs) -> float:
    """Traces both steps, where errors in the config show; gives the seconds."""
    began = time.perf_counter()
    _ = programs.traced_train, programs.recipe.views, programs.recipe.whole_set_metrics
    return time.perf_counter() - began


def _compile_in_background(programs: Programs, tracing: float) -> concurrent.futures.Future[float]:
    """Compiles both steps in a thread; gives the seconds, those of tracing with them."""

    def compile() -> float:
        began = time.perf_counter()
        _ = programs.train  # a cached property
        return tracing + time.perf_counter() - began

    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
    future = pool.submit(compile)
    pool.submit(lambda: programs.eval)
    pool.shutdown(wait=False)
    return future


def _ranges(
    start: int, total: int, size: int, cadences: tuple[Any, ...], traced: tuple[int, int]
) -> list[tuple[int, int]]:
    """Steps start to total in chunks of at most `size` that end where something is to be done: [(first, stop), …]."""
    ranges = []
    while start < total:
        due = min(configs.next_due(start, every, total) for every in cadences)
        due = min([due, *(edge for edge in traced if edge > start)])
        chunks = -(-(due - start) // size)
        stop = start - (start - due) // chunks  # chunks of equal length, give or take a step: little padding
        ranges.append((start, stop))
        start = stop
    return ranges


def _train_record(sums: metrics.Sums) -> dict[str, float]:
    """What is logged of a window of steps: means over its examples or steps, of all seeds together."""
    total = {name: np.sum(value).item() for name, value in sums.items()}
    return {
        "loss": total["loss"] / total["examples"],
        "accuracy": total["correct"] / total["examples"],
        **{name: total[name] / total["steps"] for name in ("grad_norm", "param_norm", "learning_rate")},
    }


def _check_finite(
    sums: metrics.Sums, programs: Programs, images: stream.Images, workdir: Workdir, checkpoints: Checkpoints
) -> None:
    """Raises UserError for a step whose loss, gradient or parameters were not finite; its examples are recorded."""
    by_seed = np.atleast_1d(sums["nonfinite_step"])
    bad, config = int(by_seed.min()), programs.recipe.config
    if bad == metrics.NO_STEP:
        return
    checkpoints.wait()
    seed = config.seed + int(by_seed.argmin())
    ids = stream.example_ids(seed, bad, config.batch_size, len(images)).tolist()
    file = workdir.path / "nonfinite.json"
    name = getattr(images.source, "name", None)
    provenance.write_json(
        file, {"step": bad, "seed": seed, "example_ids": ids, "examples": [name(i) for i in ids] if name else None}
    )
    good = checkpoints.steps()
    kept = f"the last good checkpoint, of step {good[-1]}, is kept" if good else "no checkpoint had been saved yet"
    raise UserError(
        f"the loss, gradient or parameters are not finite at step {bad}, on the example ids {str(ids[:8])[:-1]}, …] "
        f"(all in {file}); {kept}; look at those examples, or lower the learning rate, or set clip=1.0"
    )


def _log_parameters(params: Any, num_seeds: int) -> None:
    if num_seeds > 1:
        log.info("%d replicas of these:", num_seeds)
        params = jax.tree.map(lambda x: x[0], params)
    try:
        from clu import parameter_overview
    except ImportError:
        log.info("%d parameters", sum(x.size for x in jax.tree.leaves(params)))
    else:
        log.info("parameters:\n%s", parameter_overview.get_parameter_overview(params, include_stats=False))


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], str | None]]:
    """While inside, SIGTERM and SIGINT are noted instead of obeyed; gives a function that tells which one came.

    A second signal has its usual effect at once.
    """
    received: list[str] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
