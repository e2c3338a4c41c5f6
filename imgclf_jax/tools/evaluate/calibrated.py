"""`evaluate --calibrate`: a run's calibration.json, fitted to its evaluation set `val`, and what it is used for.

Prediction sets are those of split conformal prediction (APS; Romano et al. 2020, arXiv:2006.02544). Only the scores of
`val` are randomized, so sets cover at least what is wanted, and an image always gets the same one.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from imgclf_jax import losses, metrics
from imgclf_jax.core import json_files
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.terminal import print_json, print_table, print_text
from imgclf_jax.core.text import decimals
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.data import splits, stream
from imgclf_jax.data.source import Source
from imgclf_jax.losses import Link
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.scores.classification import Predictions
from imgclf_jax.tools.evaluate import outputs
from imgclf_jax.trained import Trained, calibrated_facts

_SCALE, _BIAS = (1 / 20, 20.0), (-20.0, 20.0)  # a fit that ends at these has no finite optimum
_SCORES, _COVERAGES = ("accuracy", "nll", "calibration_error"), (0.9, 0.95, 0.99)


def check(config: ConfigDict, workdir: Workdir | None, base: Mapping[str, Source]) -> Workdir:
    """The run to calibrate. Raises UserError unless its set `val` shares no example with training or another set."""
    if not workdir or "val" not in config.data.eval:
        raise UserError("--calibrate fits to the evaluation set val of the run in --workdir: train one with "
                        "--config.data.train='train[:90%]' --config.data.eval.val='train[90%:]'")  # fmt: skip
    own, run = config.data.eval.val, workdir.load_config().data
    others = {f"data.eval.{name}": text for name, text in config.data.eval.items() if name != "val"}
    others |= {"data.train": run.train} if run.source == config.data.source else {}
    sizes = {name: source.size for name, source in base.items()}
    for name, (count, _) in ({} if ")" in own else splits.count_shared(own, others, sizes)).items():
        if count:
            raise UserError(f"--calibrate: val={own!r} shares {count:,} examples with {name}={others[name]!r}; fit to "
                            "a split that has none of them")  # fmt: skip
    return workdir


def report(model: Trained, workdir: Workdir, evals: Mapping[str, stream.Images], method: str, format: str) -> int:
    """Fits by "temperature", "vector" or "none", and writes calibration.json, which `load_trained` reads.

    Prints the scores of each set and their `calibrated_…` values, the `coverage_…` of prediction sets and their mean
    number of `classes_…`. The format "json" prints one object: the `step`, `method`, `scale`, `bias`, and each set.
    """
    link, results = losses.link_of(model.config.loss), dict[str, JsonObject]()
    found = {name: outputs.compute(model, evals[name], "logits") for name in sorted(evals, key="val".__ne__)}
    numbers = dict(zip(("scale", "bias"), fit(*found["val"], link, method), strict=True))
    for name, (logits, truth) in found.items():
        _, before = _score(logits, truth, link)
        own, after = _score((logits * numbers["scale"] + numbers["bias"]).astype(np.float32), truth, link)
        sums, label = sums_before(own.probabilities), (np.arange(len(truth)), own.labels)
        if name == "val":
            numbers["confidence"] = np.sort(own.probabilities.max(1))
            numbers["aps"] = scores(sums[label], own.probabilities[label])
        else:
            numbers[f"labels of {name}"] = np.sort(sums[label])  # for the coverage of any threshold
        results[name] = {"examples": len(truth), **before, **{f"calibrated_{kind}": after[kind] for kind in _SCORES}}
        for wanted in _COVERAGES:
            inside = sums < threshold(numbers["aps"], wanted)
            results[name] |= {f"coverage_{wanted}": inside[label].mean(), f"classes_{wanted}": inside.sum(1).mean()}
    json_files.write(workdir.calibration, {
        "of": calibrated_facts(model), "method": method, "step": model.step, "val": model.config.data.eval.val,
        "numbers": {name: np.asarray(values, np.float64).tolist() for name, values in numbers.items()},
    })  # fmt: skip
    fitted = {name: numbers[name].tolist() for name in ("scale", "bias")}
    if format == "json":
        print_json({"step": model.step, "method": method, **fitted, **results})
        return 0
    texts = {name: {key: decimals(value) for key, value in one.items()} for name, one in results.items()}
    print_table(["set", *_SCORES], [[name, *(f"{one[kind]} → {one[f'calibrated_{kind}']}" for kind in _SCORES)]
                                    for name, one in texts.items()])  # fmt: skip
    print_table(["set", *(f"sets for {wanted} (size)" for wanted in _COVERAGES)],
                [[name, *(f"{one[f'coverage_{c}']} ({one[f'classes_{c}']})" for c in _COVERAGES)]
                 for name, one in texts.items()])  # fmt: skip
    temperature = f"temperature {1 / fitted['scale'][0]:.4f}" if method == "temperature" else f"method {method}"
    print_text(f"{temperature}, fitted to val: wrote {workdir.calibration}, which predict, serve and export use")
    return 0


def fit(logits: np.ndarray, truth: np.ndarray, link: Link, method: str) -> tuple[np.ndarray, np.ndarray]:
    """The scale and bias, f64[1] or by "vector" f64[classes], that minimize the NLL of logits f32[seeds, n, classes].

    `truth` is i32[n] or f32[n, classes]. All seeds are scaled alike, for the likelihood of their mean probabilities.
    """
    from scipy import optimize

    k = logits.shape[-1] if method == "vector" else 1
    start = np.repeat([1.0, 0.0], k)
    if method == "none":
        return start[:k], start[k:]
    with jax.enable_x64(True):
        z, wanted = jnp.asarray(logits, jnp.float64), jnp.asarray(truth, None if truth.ndim == 1 else jnp.float64)

        @jax.jit
        @jax.value_and_grad
        def mean_nll(x: jax.Array) -> jax.Array:
            return jnp.mean(link.nll(link.ensemble(z * x[:k] + x[k:]), wanted))

        bounds = [_SCALE] * k + [_BIAS if method == "vector" else (0.0, 0.0)] * k
        found = optimize.minimize(lambda x: tuple(map(np.asarray, mean_nll(x))), start, jac=True, method="L-BFGS-B",
                                  bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000})  # fmt: skip
    scale, bias = found.x[:k], found.x[k:]
    # A total below log(2) makes every example correct: the likelihood then grows with the scale, without an optimum.
    if np.isin(scale, _SCALE).any() or np.isin(bias, _BIAS).any() or found.fun * len(truth) < math.log(2):
        raise UserError(f"--calibrate={method}: the {len(truth)} examples of val hold too few mistakes for an optimum; "
                        "hold out more, or pass --calibrate=none for --reject and --coverage alone")  # fmt: skip
    return scale, bias


@functools.partial(jax.jit, static_argnums=2)
def _predict(logits: jax.Array, truth: jax.Array, link: Link) -> tuple[metrics.AnyPredictions, jax.Array]:
    """The predictions and the mean NLL, as one program: operation by operation, they take seconds to compile."""
    z, labels = link.ensemble(logits), truth if truth.ndim == 1 else metrics.dominant_labels(truth)
    return metrics.predict(z, labels, link, jnp.ones(len(labels), bool)), jnp.mean(link.nll(z, truth))


def _score(logits: np.ndarray, truth: np.ndarray, link: Link) -> tuple[Predictions, dict[str, float]]:
    """The predictions of logits f32[seeds, n, classes], of several seeds the ensemble's, and their scores."""
    own, nll = jax.device_get(_predict(logits, truth, link))
    values = {**own.compute(np.ones((1, len(truth)))), "nll": [nll]}
    return own, {kind: float(values[kind][0]) for kind in _SCORES}


def sums_before(probabilities: np.ndarray) -> np.ndarray:
    """f64[n, classes]: the sum of the probabilities f32[n, classes] that rank before each class."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(np.float64(probabilities), order, 1), 1)
    out = np.zeros_like(sums)
    np.put_along_axis(out, order[:, 1:], sums[:, :-1], 1)
    return out


def scores(before: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The sorted conformity scores f64[n] of labels with these `sums_before` and these probabilities, both [n]."""
    return np.sort(before + np.random.default_rng(0).uniform(size=len(own)) * own)


def threshold(scores: np.ndarray, coverage: float) -> float:
    """What the `sums_before` of the classes in a set are below; infinite if the sorted scores are too few to tell."""
    rank = math.ceil((len(scores) + 1) * coverage - 1e-9)
    return float(scores[rank - 1]) if rank <= len(scores) else math.inf
