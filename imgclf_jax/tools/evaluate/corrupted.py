"""`evaluate --corruptions`: the accuracy of a trained model on corrupted images, by corruption and severity."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from imgclf_jax import metrics
from imgclf_jax.core import processes, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.losses import Task
from imgclf_jax.programs import Programs
from imgclf_jax.run.terminal import print_table, track
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.evaluate import corruptions
from imgclf_jax.tools.evaluate.chosen_corruptions import WITHOUT_FROST, parse
from imgclf_jax.train import evaluation
from imgclf_jax.trained import load_converted, restore

CLEAN = ("clean", 0)
Key = tuple[str, int]  # a corruption and its severity
_SEED = 0  # so that the corrupted images of a set are the same for every run


def report(
    config: ConfigDict, workdir: Workdir | None, checkpoint: str, corrupted: str, folder: str, format: str
) -> int:  # fmt: skip
    """Prints a table for each evaluation set: a row a corruption, its accuracy at each severity, and the means.

    `corrupted` is "all" or names between commas, `folder` that of the photographs for `frost`, or "". Of several seeds
    it is their ensemble's accuracy. The format "json" prints one object: the `step`, and for each set `examples`,
    `clean`, `corruptions` with `severities` and `mean` of each, and `mean_corruption_accuracy`; at last what is
    `left_out` of the fifteen. Raises UserError for an unknown name, for images that are neither grey nor RGB, and for
    photographs that are missing.
    """
    names, photographs = parse(corrupted, folder)
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = sources.open_data(config)
    programs, state, step = restored or load_converted(config, base)
    programs.check_predicts()
    evals = evaluation.open_evals(programs, base)
    if workdir:
        evaluation.compare_with_record(programs, workdir, base, evals)
    if programs.recipe.task in (Task.MULTILABEL, Task.REGRESSION):
        raise UserError(f"--corruptions measures accuracy, and a run with {metrics.TASK_NAMES[programs.recipe.task]} "
                        "has none; evaluate it without")  # fmt: skip
    results: dict[str, Any] = {"step": step}
    for name, images in evals.items():
        found = accuracies(programs, state, images, names, f"corrupting {name}", photographs)
        results[name] = _summary(found, names, len(images))
    if processes.index():
        return 0
    left_out = ["frost"] if corrupted == "all" and not folder else []
    if format == "json":
        print(json.dumps(results | {"left_out": left_out}, indent=2))
        return 0
    del results["step"]
    for name, found in results.items():
        _print(name, found, programs.recipe.num_seeds)
    if left_out:
        print(WITHOUT_FROST)
    return 0


def accuracies(
    programs: Programs, state: Any, images: stream.Images, names: list[str], what: str = "corrupting",
    photographs: Sequence[np.ndarray] = (),
) -> dict[Key, float]:  # fmt: skip
    """The accuracy over all of `images`, by (corruption, severity), and that of `CLEAN` images.

    Images are read once. Each corruption is compiled once for all severities, apart from the model. `what` stands
    beside the progress on a terminal. `photographs` are for `frost`.
    """
    mesh, size = programs.mesh, programs.eval_steps_per_call
    kinds = [(name, severity) for name in names for severity in corruptions.SEVERITIES]
    tables = {
        kind: sharding.put_replicated((of, np.asarray(jax.random.key_data(_key(kind)))), mesh)
        for kind in kinds
        for of in [corruptions.tables_of(*kind, images.shape, photographs)]
    }
    change = {name: _corrupting(programs, name) for name in names}
    together = jax.jit(lambda *batches: jnp.stack(batches), out_shardings=sharding.sharded(mesh, axis=1))
    sums: dict[Key, metrics.Sums] = {kind: {} for kind in [CLEAN, *kinds]}
    batch, places = programs.eval_batch_size, sharding.rows_here(programs.eval_batch_size, mesh)

    def results() -> Iterator[tuple[Key, Any]]:
        for number, (chunk, steps) in enumerate(evaluation.chunks(programs, images)):
            yield CLEAN, programs.eval(*state.evaluated, chunk, np.int32(steps))
            at = [
                sharding.put_batch({"place": ((number * size + i) * batch + places).astype(np.int32)}, mesh)["place"]
                for i in range(steps)
            ]
            for kind in kinds:
                batches = [change[kind[0]](chunk["image"], np.int32(i), at[i], *tables[kind]) for i in range(steps)]
                batches += batches[-1:] * (size - steps)  # which `eval` does not look at
                yield kind, programs.eval(*state.evaluated, {**chunk, "image": together(*batches)}, np.int32(steps))

    total = -(-len(images) // (batch * size)) * len(sums)
    pending: tuple[Key, Any] | None = None
    for kind, result in track(results(), total, what):
        if pending is not None:
            evaluation.add(sums[pending[0]], jax.device_get(pending[1][0]))  # while the device computes the next
        pending = kind, result
    assert pending is not None
    evaluation.add(sums[pending[0]], jax.device_get(pending[1][0]))
    ensemble = "ensemble_accuracy" if programs.recipe.num_seeds > 1 else "accuracy"
    return {kind: metrics.summarize(own)[ensemble] for kind, own in sums.items()}


def _key(kind: Key) -> jax.Array:
    return corruptions.key_of(*kind, _SEED)


def _corrupting(programs: Programs, name: str) -> Callable[..., jax.Array]:
    """Jitted (chunk uint8[k, b, h, w, c], i, places i32[b], tables, key data) → uint8[b, h, w, c], batch i corrupted.

    Each device works on its own examples.
    """
    split, of_chunk = (sharding.sharded(programs.mesh, axis).spec for axis in (0, 1))
    whole = PartitionSpec()

    def own(chunk: jax.Array, i: jax.Array, places: jax.Array, tables: Any, key: jax.Array) -> jax.Array:
        images = jax.lax.dynamic_index_in_dim(chunk, i, keepdims=False)
        return corruptions.with_tables(name, images, tables, jax.random.wrap_key_data(key), places)

    specs = (of_chunk, whole, split, whole, whole)
    return jax.jit(jax.shard_map(own, mesh=programs.mesh, in_specs=specs, out_specs=split, check_vma=False))


def _summary(found: dict[Key, float], names: list[str], examples: int) -> dict[str, Any]:
    """What is printed of a set."""
    each = {name: [found[name, severity] for severity in corruptions.SEVERITIES] for name in names}
    return {
        "examples": examples,
        "clean": found[CLEAN],
        "corruptions": {name: {"severities": own, "mean": float(np.mean(own))} for name, own in each.items()},
        "mean_corruption_accuracy": float(np.mean(list(each.values()))),
    }


def _print(name: str, found: dict[str, Any], num_seeds: int) -> None:
    of = f" of the ensemble of {num_seeds} seeds" if num_seeds > 1 else ""
    print(f"{name}: examples {found['examples']}  accuracy{of} {found['clean']:.4f}  "
          f"mean corruption accuracy {found['mean_corruption_accuracy']:.4f}")  # fmt: skip
    rows = [[corruption, *(f"{value:.4f}" for value in (*own["severities"], own["mean"]))]
            for corruption, own in found["corruptions"].items()]  # fmt: skip
    columns = zip(*(own["severities"] for own in found["corruptions"].values()), strict=True)
    means = [*map(np.mean, columns), found["mean_corruption_accuracy"]]
    rows.append(["mean of all", *(f"{value:.4f}" for value in means)])
    print_table(["corruption", *(f"severity {s}" for s in corruptions.SEVERITIES), "mean"], rows)
