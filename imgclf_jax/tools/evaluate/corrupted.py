"""`evaluate --corruptions`: a trained model's accuracy on corrupted images, by corruption and severity."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec

from imgclf_jax import metrics
from imgclf_jax.core import processes, sharding
from imgclf_jax.core.terminal import print_json, print_table, print_text, track
from imgclf_jax.core.text import decimals
from imgclf_jax.core.typing import JsonObject, PyTree
from imgclf_jax.data import stream
from imgclf_jax.programs import Programs
from imgclf_jax.step import TrainState
from imgclf_jax.tools.evaluate import corruptions
from imgclf_jax.tools.evaluate.chosen_corruptions import WITHOUT_FROST
from imgclf_jax.tools.evaluate.fields import Tables
from imgclf_jax.train import evaluation
from imgclf_jax.trained import Trained

CLEAN = ("clean", 0)
Key = tuple[str, int]  # a corruption and its severity
_SEED = 0  # the corrupted images of a set are the same for every run


def report(
    model: Trained, evals: dict[str, stream.Images], names: list[str], photographs: Sequence[np.ndarray],
    left_out: list[str], format: str,
) -> int:  # fmt: skip
    """Prints a table for each evaluation set: the accuracy of each corruption at each severity, and the means.

    Several seeds are evaluated as an ensemble. The format "json" prints one object: the `step`; for each set
    `examples`, `clean`, `corruptions` with `severities` and `mean` of each, and `mean_corruption_accuracy`; and which
    of the fifteen corruptions are `left_out`.

    `names` and `photographs` are those of `chosen_corruptions.parse`. Raises UserError, before evaluating, for
    images that are neither grayscale nor RGB or too small for one of the corruptions.
    """
    programs, state, step = model
    results: JsonObject = {"step": step}
    for name, images in evals.items():
        by_kind = measure(programs, state, images, names, f"corrupting {name}", photographs)
        results[name] = _summarize(by_kind, names, len(images))
    if processes.index():
        return 0
    if format == "json":
        print_json(results | {"left_out": left_out})
        return 0
    del results["step"]
    for name, summary in results.items():
        _print(name, summary, programs.recipe.num_seeds)
    if left_out:
        print_text(WITHOUT_FROST)
    return 0


def measure(
    programs: Programs, state: TrainState, images: stream.Images, names: list[str], caption: str = "corrupting",
    photographs: Sequence[np.ndarray] = (),
) -> dict[Key, float]:  # fmt: skip
    """Returns the accuracy over all of `images` by (corruption, severity), and under `CLEAN` without corruption.

    Images are read once. Each corruption is compiled once for all severities, separately from the model. `caption`
    labels the progress bar. `photographs` are for `frost`.
    """
    mesh = programs.mesh
    kinds = [(name, severity) for name in names for severity in corruptions.SEVERITIES]
    arguments = {}  # (tables, key data) on the device
    for kind in kinds:
        key = np.asarray(jax.random.key_data(corruptions.make_key(*kind, _SEED)))
        arguments[kind] = sharding.put_replicated(
            (corruptions.make_tables(*kind, images.shape, photographs), key), mesh
        )
    corrupt = {name: _jit_corruption(programs, name) for name in names}
    sums: dict[Key, metrics.Sums] = {kind: {} for kind in [CLEAN, *kinds]}
    size, rows = programs.eval_batch_size, sharding.rows_here(programs.eval_batch_size, mesh)

    def results() -> Iterator[tuple[Key, PyTree]]:
        for n, batch in enumerate(evaluation.batches(programs, images)):
            yield CLEAN, programs.eval(*state.evaluated, batch)
            positions = sharding.put_batch((n * size + rows).astype(np.int32), mesh)
            for kind in kinds:
                corrupted = corrupt[kind[0]](batch["image"], positions, *arguments[kind])
                yield kind, programs.eval(*state.evaluated, {**batch, "image": corrupted})

    total = -(-len(images) // size) * len(sums)
    pending: tuple[Key, PyTree] | None = None
    for kind, result in track(results(), total, caption):
        if pending is not None:
            evaluation.add(sums[pending[0]], jax.device_get(pending[1][0]))  # while the device computes the next
        pending = kind, result
    assert pending is not None
    evaluation.add(sums[pending[0]], jax.device_get(pending[1][0]))
    accuracy = "ensemble_accuracy" if programs.recipe.num_seeds > 1 else "accuracy"
    return {kind: metrics.summarize(own)[accuracy] for kind, own in sums.items()}


def _jit_corruption(programs: Programs, name: str) -> Callable[..., jax.Array]:
    """Returns jitted (images uint8[b, h, w, c], positions i32[b], tables, key data) → corrupted images.

    Each device corrupts its own examples.
    """
    batch_spec, replicated = sharding.sharded(programs.mesh).spec, PartitionSpec()

    def corrupt(images: jax.Array, positions: jax.Array, tables: Tables, key: jax.Array) -> jax.Array:
        return corruptions.apply(name, images, tables, jax.random.wrap_key_data(key), positions)

    specs = (batch_spec, batch_spec, replicated, replicated)
    return jax.jit(jax.shard_map(corrupt, mesh=programs.mesh, in_specs=specs, out_specs=batch_spec, check_vma=False))


def _summarize(by_kind: dict[Key, float], names: list[str], examples: int) -> JsonObject:
    by_name = {name: [by_kind[name, severity] for severity in corruptions.SEVERITIES] for name in names}
    return {
        "examples": examples,
        "clean": by_kind[CLEAN],
        "corruptions": {name: {"severities": own, "mean": float(np.mean(own))} for name, own in by_name.items()},
        "mean_corruption_accuracy": float(np.mean(list(by_name.values()))),
    }


def _print(name: str, summary: JsonObject, num_seeds: int) -> None:
    ensemble = f" of the ensemble of {num_seeds} seeds" if num_seeds > 1 else ""
    print(f"{name}: examples {summary['examples']}  accuracy{ensemble} {decimals(summary['clean'])}  "
          f"mean corruption accuracy {decimals(summary['mean_corruption_accuracy'])}")  # fmt: skip
    rows = [[corruption, *(decimals(value) for value in (*own["severities"], own["mean"]))]
            for corruption, own in summary["corruptions"].items()]  # fmt: skip
    columns = zip(*(own["severities"] for own in summary["corruptions"].values()), strict=True)
    means = [*map(np.mean, columns), summary["mean_corruption_accuracy"]]
    rows.append(["mean of all", *map(decimals, means)])
    print_table(["corruption", *(f"severity {s}" for s in corruptions.SEVERITIES), "mean"], rows)
