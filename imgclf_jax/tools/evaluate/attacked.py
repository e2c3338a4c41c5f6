"""`evaluate --attack`: the accuracy of a trained model on adversarial examples, beside that on the clean ones."""

import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import losses, metrics, step
from imgclf_jax.core import processes, rng, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.losses import Task
from imgclf_jax.methods import table
from imgclf_jax.methods.pgd import Attack
from imgclf_jax.programs import Programs
from imgclf_jax.run.terminal import format_metrics, track
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train import evaluation
from imgclf_jax.trained import load_converted, restore

log = logging.getLogger(__name__)

_NOT_FINITE, _STUCK = "not_finite", "stuck"  # how many examples an attack fails on
_SEED = 0  # so that an attack on a set starts at the same points for every run


def report(config: ConfigDict, workdir: Workdir | None, checkpoint: str, attack: str, format: str) -> int:
    """Prints for each evaluation set `accuracy` and `nll`, and the same under the attack as `attacked_…`.

    `attack` is a spec, see `methods.pgd.attack`. Each of several seeds is attacked by itself: the metrics are means
    over the seeds, with sample standard deviations as `…_std`. The format "json" prints one object: the `step`, the
    `attack`, and each set. Raises UserError for an unknown attack, for a run that predicts no classes, and for one
    whose `augment` has no fixed scale.
    """
    perturb = table.build_attack(attack)
    restored = restore(config, workdir, checkpoint) if workdir else None
    base = sources.open_data(config)
    programs, state, at = restored or load_converted(config, base)
    programs.check_predicts()
    if programs.recipe.task in (Task.MULTILABEL, Task.REGRESSION):
        raise UserError(f"--attack measures accuracy, and a run with {metrics.TASK_NAMES[programs.recipe.task]} has "
                        "none; evaluate it without")  # fmt: skip
    evals = evaluation.open_evals(programs, base)
    if workdir:
        evaluation.compare_with_record(programs, workdir, base, evals)
    evaluate = programs.jitted(make_step(programs, perturb))
    results: dict[str, Any] = {}
    for name, images in evals.items():
        sums = _sums(programs, state, evaluate, images, f"attacking {name}")
        _check_failures(name, sums["failed"])
        results[name] = _summary(sums)
    if processes.index():
        return 0
    if format == "json":
        print(json.dumps({"step": at, "attack": attack, **results}, indent=2))
        return 0
    for name, found in results.items():
        print(f"{name}: {format_metrics(found)}")
    return 0


def make_step(programs: Programs, perturb: Attack) -> Callable[..., dict[str, metrics.Sums]]:
    """`step(params, model_state, batch) -> {"clean": sums, "attacked": sums, "failed": counts}`, of seeds [seeds, …].

    The batch is that of evaluation with "index" i32[b], their positions in the set, which key their draws. The
    attack ascends the negative log-likelihood, which no label smoothing blunts, of the prediction as evaluation makes
    it: the model in evaluation, and the mean over the views of `tta`. `failed` counts the examples whose pixels are not
    finite afterwards, and those whose gradient is zero.
    """
    recipe, link = programs.recipe, losses.link_of(programs.recipe.config.loss)
    augment, (low, high) = recipe.augment(train=False), recipe.pixel_range()
    logits_of = step.make_logits(recipe.model, lambda _, images: images, recipe.views)  # of normalized images

    def of_seed(params: Any, model_state: Any, batch: Any) -> dict[str, metrics.Sums]:
        wanted = batch["label" if recipe.task is Task.CLASSES else "target"]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng.key(_SEED, "attack"), batch["index"])

        def nll(images: jax.Array) -> jax.Array:
            return jnp.sum((link.nll or recipe.loss)(logits_of(params, model_state, images), wanted))

        def sums(images: jax.Array) -> metrics.Sums:
            logits = logits_of(params, model_state, images)
            found = metrics.task_sums(logits, wanted, recipe.loss(logits, wanted), link, batch["mask"], recipe.task)
            return {name: found[name] for name in ("examples", "correct", "nll") if name in found}

        clean = augment(None, batch["image"])
        found = perturb(jax.grad(nll), clean, keys, low, high)
        failed = {_NOT_FINITE: ~jnp.all(jnp.isfinite(found), (1, 2, 3)),
                  _STUCK: jnp.all(jax.grad(nll)(clean) == 0, (1, 2, 3))}  # fmt: skip
        failed = {name: jnp.sum(batch["mask"] & x, dtype=jnp.int32) for name, x in failed.items()}
        return {"clean": sums(clean), "attacked": sums(found), "failed": failed}

    return of_seed if recipe.num_seeds == 1 else jax.vmap(of_seed, (0, 0, None))


def _sums(
    programs: Programs, state: Any, evaluate: Callable[..., Any], images: stream.Images, what: str
) -> dict[str, metrics.Sums]:
    """The sums over all of `images`, each example once. `what` stands beside the progress on a terminal."""
    size, mesh = programs.eval_batch_size, programs.mesh
    rows = sharding.rows_here(size, mesh)
    found: dict[str, metrics.Sums] = {"clean": {}, "attacked": {}, "failed": {}}
    batches = stream.eval_batches(images, size, rows)
    for number, batch in enumerate(track(batches, -(-len(images) // size), what)):
        placed = {**batch, "index": (number * size + rows).astype(np.int32)}
        for name, sums in jax.device_get(evaluate(*state.evaluated, sharding.put_batch(placed, mesh))).items():
            evaluation.add(found[name], {key: value[None] for key, value in sums.items()})
    return found


def _check_failures(name: str, failed: metrics.Sums) -> None:
    """Warns of examples with a zero gradient. Raises UserError if the attack makes pixels that are not finite."""
    if count := int(np.max(failed[_NOT_FINITE])):
        raise UserError(f"--attack makes NaN or infinite pixels of {count} examples of {name}: the gradient of the "
                        "model is not finite there")  # fmt: skip
    if count := int(np.max(failed[_STUCK])):
        log.warning("the gradient of %d examples of %s is zero, so that no step along it moves them: their accuracy "
                    "under attack says little", count, name)  # fmt: skip


def _summary(found: dict[str, metrics.Sums]) -> dict[str, float]:
    """What is printed of a set: the metrics of the clean examples, and of the attacked ones as `attacked_NAME`."""
    out: dict[str, float] = {}
    for kind, prefix in (("attacked", "attacked_"), ("clean", "")):
        sums = {name: np.atleast_1d(value) for name, value in found[kind].items()}
        each = [metrics.summarize({n: v[i] for n, v in sums.items()}) for i in range(len(sums["examples"]))]
        means = metrics.mean_over_seeds(each) if len(each) > 1 else each[0]
        out = {("examples" if name == "examples" else prefix + name): value for name, value in means.items()} | out
    return out
