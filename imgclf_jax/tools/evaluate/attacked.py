"""`evaluate --attack`: a trained model's accuracy on clean and adversarial examples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from imgclf_jax import losses, metrics, step
from imgclf_jax.core import processes, rng, sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.terminal import format_metrics, print_json, print_text, track
from imgclf_jax.core.typing import Batch, JsonObject, ModelState, Params
from imgclf_jax.data import stream
from imgclf_jax.losses import Task
from imgclf_jax.methods.pgd import Attack
from imgclf_jax.programs import Programs
from imgclf_jax.train import evaluation
from imgclf_jax.trained import Trained

_SEED = 0  # an attack on a set starts at the same points for every run


def report(model: Trained, evals: dict[str, stream.Images], attack: str, perturb: Attack, format: str) -> int:
    """Prints `accuracy` and `nll` of each evaluation set, and both under attack as `attacked_…`.

    `attack` is the spec of `perturb` (see `methods.pgd.attack`). Each seed of a run is attacked separately: the metrics
    are means over the seeds, with sample standard deviations as `…_std`. The format "json" prints one object: the
    `step`, the `attack`, and each set. Raises UserError if the run's `augment` has no fixed scale.
    """
    programs, state, at = model
    evaluate, size = programs.jitted(make_step(programs, perturb)), programs.eval_batch_size
    rows = sharding.rows_here(size, programs.mesh)
    results: JsonObject = {}
    for name, images in evals.items():
        sums: dict[str, metrics.Sums] = {"clean": {}, "attacked": {}, "failed": {}}
        batches = track(stream.eval_batches(images, size, rows), -(-len(images) // size), f"attacking {name}")
        for i, batch in enumerate(batches):
            given = sharding.put_batch({**batch, "index": (i * size + rows).astype(np.int32)}, programs.mesh)
            for kind, new in jax.device_get(evaluate(*state.evaluated, given)).items():
                evaluation.add(sums[kind], {key: value[None] for key, value in new.items()})
        if count := int(np.max(sums["failed"]["examples"])):
            raise UserError(f"--attack makes NaN or infinite pixels in {count} examples of {name}: the model's "
                            "gradient is not finite there")  # fmt: skip
        results[name] = _summarize(sums)
    if processes.index():
        return 0
    if format == "json":
        print_json({"step": at, "attack": attack, **results})
        return 0
    for name, summary in results.items():
        print_text(f"{name}: {format_metrics(summary)}")
    return 0


def make_step(programs: Programs, perturb: Attack) -> Callable[..., dict[str, metrics.Sums]]:
    """Returns `step(params, model_state, batch) -> {"clean": sums, "attacked": sums, "failed": counts}`.

    The arrays of several seeds are [seeds, …]. The batch is an evaluation batch with "index" i32[b], the examples'
    positions in the set, which key the random draws. The attack ascends the negative log-likelihood (without label
    smoothing) of the evaluation-time prediction, TTA included. `failed` counts the examples with nonfinite pixels after
    the attack.
    """
    recipe, link = programs.recipe, losses.link_of(programs.recipe.config.loss)
    augment, (low, high) = recipe.augment(train=False), recipe.pixel_range()
    logits_fn = step.make_logits(recipe.model, lambda _, images: images, recipe.views)  # takes normalized images

    def one_seed(params: Params, model_state: ModelState, batch: Batch) -> dict[str, metrics.Sums]:
        truth = batch["label" if recipe.task is Task.CLASSES else "target"]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng.key(_SEED, "attack"), batch["index"])

        def nll(images: jax.Array) -> jax.Array:
            return jnp.sum(link.nll(logits_fn(params, model_state, images), truth))

        def compute_sums(images: jax.Array) -> metrics.Sums:
            logits = logits_fn(params, model_state, images)
            sums = metrics.task_sums(logits, truth, recipe.loss(logits, truth), link, batch["mask"], recipe.task)
            return {name: sums[name] for name in ("examples", "correct", "nll") if name in sums}

        clean = augment(None, batch["image"])
        attacked = perturb(jax.grad(nll), clean, keys, low, high)
        failed = batch["mask"] & ~jnp.all(jnp.isfinite(attacked), (1, 2, 3))
        return {"clean": compute_sums(clean), "attacked": compute_sums(attacked),
                "failed": {"examples": jnp.sum(failed, dtype=jnp.int32)}}  # fmt: skip

    return one_seed if recipe.config.num_seeds == 1 else jax.vmap(one_seed, (0, 0, None))


def _summarize(totals: dict[str, metrics.Sums]) -> dict[str, float]:
    """Returns the metrics of the clean examples, and those of the attacked ones as `attacked_NAME`."""
    out: dict[str, float] = {}
    for kind, prefix in (("attacked", "attacked_"), ("clean", "")):
        sums = {name: np.atleast_1d(value) for name, value in totals[kind].items()}
        each = [metrics.summarize({n: v[i] for n, v in sums.items()}) for i in range(len(sums["examples"]))]
        means = metrics.mean_over_seeds(each) if len(each) > 1 else each[0]
        out = {("examples" if name == "examples" else prefix + name): value for name, value in means.items()} | out
    return out
