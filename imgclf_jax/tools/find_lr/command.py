"""The command `find-lr`: the learning-rate range test of Smith 2017 (arXiv:1506.01186, section 3.3).

A short training run raises the learning rate at every step until the loss diverges. As in fastai, the rate grows
exponentially, so that a few hundred steps cover many orders of magnitude, and the loss is smoothed.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from imgclf_jax import datasets, programs
from imgclf_jax.core import paths, spec
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.terminal import print_json
from imgclf_jax.core.text import printable
from imgclf_jax.data import stream
from imgclf_jax.optim import schedules
from imgclf_jax.programs import Programs
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.pages import html as pages
from imgclf_jax.tools.pages.charts import Line, chart
from imgclf_jax.trained import load_teacher
from imgclf_jax.weights import pretrained

log = logging.getLogger(__name__)

_STEPS = 200
_SMOOTHING = 0.95  # decay of the moving average of the loss, over about twenty steps
_DIVERGED = 4  # times the smallest smoothed loss so far: the test ends, as in fastai
_FEWEST = 10  # steps below which no slope can be read


@dataclass(frozen=True)
class RangeTest:
    """The training loss at each step of a range test, up to the step at which it diverged."""

    rates: np.ndarray  # f64[n], growing
    losses: np.ndarray  # f64[n], of the batch of each step

    @property
    def smoothed(self) -> np.ndarray:
        """f64[n]: the exponential moving average of the losses, see `_with_average`."""
        return np.array([average for _, average in _with_average(self.losses)])

    @property
    def lowest(self) -> float:
        """The learning rate of the smallest smoothed loss; beyond it training gets worse."""
        return float(self.rates[int(np.argmin(self.smoothed))])

    @property
    def steepest(self) -> float:
        """The learning rate, below `lowest`, at which the smoothed loss falls fastest per decade of the rate.

        The first tenth of the steps is left out, as in fastai: the average of few losses follows their noise. Raises
        UserError if the loss falls nowhere.
        """
        smoothed = self.smoothed
        first, end = len(smoothed) // 10, int(np.argmin(smoothed)) + 1
        if end < first + 2:
            raise UserError("the loss never falls, so the range test suggests no learning rate; check the data and the "
                            "model, or give a smaller --low")  # fmt: skip
        slopes = np.gradient(smoothed, np.log10(self.rates))[first:end]
        return float(self.rates[first + int(np.argmin(slopes))])


def _with_average(losses: Iterable[float]) -> Iterator[tuple[float, float]]:
    """Pairs each loss with the exponential moving average so far, bias-corrected as in Adam."""
    average = 0.0
    for i, loss in enumerate(losses, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        yield loss, average / (1 - _SMOOTHING**i)


def ramp(steps: schedules.Steps, total: int, low: float, high: float) -> optax.Schedule:
    """The learning rate grows exponentially from `low` at the first step to `high` at the last one."""
    return optax.exponential_decay(low, max(1, total - 1), high / low)


def main(
    config: ConfigDict, workdir: Workdir | None, steps: int | None, low: float, high: float, format: str, html: str,
) -> int:  # fmt: skip
    """Trains for `steps` steps (default: 200) with learning rates from `low` to `high`, and suggests one.

    Nothing is written but the page `html`. Raises UserError if the loss diverges at once or never falls.
    """
    del workdir  # a trial leaves no run
    steps = _STEPS if steps is None else steps
    if not 0 < low < high < math.inf:
        raise UserError(f"--low={low:g} --high={high:g}: give two learning rates, 0 < low < high")
    if steps < _FEWEST:
        raise UserError(f"--steps={steps}: a range test takes at least {_FEWEST} steps")
    trial = config.copy_and_resolve_references()
    trial.total = f"{steps} steps"
    trial.on_bad_step = "stop"  # a step that is skipped has no loss, and the next one its rate
    trial.schedule = str(spec.Call(f"{__name__}:ramp", (low, high)))
    test = measure(trial, low, high)
    suggested = _with_rate(config.schedule, test.steepest)
    if format == "json":
        print_json({"suggestion": test.steepest, "lowest": test.lowest, "schedule": suggested,
                    "learning_rates": test.rates.tolist(), "losses": test.losses.tolist(),
                    "smoothed": test.smoothed.tolist()})  # fmt: skip
    else:
        print("\n".join(_table(test, suggested)))
    if html:
        path = paths.as_path(html)
        path.parent.mkdir(parents=True, exist_ok=True)
        pages.write(path, page(test, config, suggested))
        log.info("the plot is in %s", printable(str(path)))
    return 0


def measure(config: ConfigDict, low: float, high: float) -> RangeTest:
    """Trains from the initial weights, or those of `init_from`, until the loss diverges or the steps end."""
    programs.check(config)
    images = datasets.open_train_images(config)
    compiled = programs.programs_for_images(config, images, load=load_teacher)
    compiled.check_size()
    total, losses = compiled.recipe.total, list[float]()
    rates = np.geomspace(low, high, total)
    best = math.inf
    for step, (loss, smoothed) in enumerate(_with_average(_losses(compiled, images, total))):
        if not math.isfinite(loss):
            break
        losses.append(loss)
        if smoothed > _DIVERGED * best > 0:
            break
        best = min(best, smoothed)
        if (step + 1) % max(1, total // 10) == 0:
            log.info("step %d of %d: learning rate %.2g, loss %.4g", step + 1, total, rates[step], smoothed)
    if len(losses) < _FEWEST:
        raise UserError(f"the loss diverges after {len(losses)} steps, at a learning rate of {rates[len(losses)]:.2g}; "
                        "give a smaller --low")  # fmt: skip
    return RangeTest(rates[: len(losses)], np.array(losses))


def _losses(compiled: Programs, images: stream.Images, total: int) -> Iterator[float]:
    """The mean training loss of each step, over the seeds if there are several."""
    weights = pretrained.load(compiled) if compiled.recipe.config.init_from else None
    run = compiled.init(images=compiled.first_images(images), weights=weights.taken if weights else None)
    state = run["state"]
    for _, batch in compiled.batches(images, range(total)):
        state, sums = compiled.train(state, compiled.zero_sums(), batch)
        done = jax.device_get(sums)
        yield float(np.sum(done["loss"]) / np.sum(done["examples"]))


def _with_rate(schedule: str, rate: float) -> str:
    """The schedule's spec with another peak: its first argument, or `peak`. "" for a schedule of the user's own."""
    call = spec.parse_one(schedule)
    if call.name not in schedules.SCHEDULES:
        return ""
    rate = float(f"{rate:.2g}")
    if "peak" in call.kwargs:
        return str(spec.Call(call.name, call.args, {**call.kwargs, "peak": rate}))
    return str(spec.Call(call.name, (rate, *call.args[1:]), call.kwargs))


def _table(test: RangeTest, suggested: str) -> Iterator[str]:
    yield f"{'learning rate':>13}  {'loss':>10}"
    shown = np.unique(np.linspace(0, len(test.rates) - 1, 12).astype(int))
    smoothed = test.smoothed
    yield from (f"{test.rates[i]:>13.2e}  {smoothed[i]:>10.4g}" for i in shown)
    yield f"the loss falls fastest at {test.steepest:.2g}, and is lowest at {test.lowest:.2g}"
    if suggested:
        yield f"try --config.schedule={suggested!r}"


def page(test: RangeTest, config: ConfigDict, suggested: str) -> str:
    """The loss over the learning rate, as one HTML file without scripts."""
    x = np.log10(test.rates)
    lines = [
        Line("loss of each step", 1, list(zip(x.tolist(), test.losses.tolist(), strict=True))),
        Line("smoothed", 0, list(zip(x.tolist(), test.smoothed.tolist(), strict=True))),
    ]
    said = f"The smoothed loss falls fastest at {test.steepest:.2g} and is lowest at {test.lowest:.2g}."
    more = f" Try schedule={suggested!r}." if suggested else ""
    curve = chart("training loss", "log10 of the learning rate", lines, description=said)
    title = f"Learning-rate range test of {config.model}"
    return pages.document(title, [
        f"<h1>{pages.text(title)}</h1>", pages.paragraph(said + more),
        pages.legend([(line.name, line.color, False) for line in lines]),
        pages.charts([pages.figure("training loss", curve)]),
        pages.paragraph(f"optimizer={config.optimizer!r}, batch_size={config.batch_size}, seed={config.seed}", True),
    ])  # fmt: skip
