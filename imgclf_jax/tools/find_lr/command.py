"""The command `find-lr`: the learning-rate range test of Smith 2017 (arXiv:1506.01186, section 3.3).

A short training run raises the learning rate at every step until the loss diverges. As in fastai, the rate grows
exponentially, so that a few hundred steps cover many orders of magnitude, and the loss is smoothed.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from imgclf_jax import datasets, programs
from imgclf_jax.core import paths, spec, terminal
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.data import stream
from imgclf_jax.optim import schedules
from imgclf_jax.programs import Programs
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.pages import html as pages
from imgclf_jax.tools.pages.charts import Line, chart
from imgclf_jax.trained import load_teacher
from imgclf_jax.weights import pretrained

_STEPS = 200
_SMOOTHING = 0.95  # decay of the moving average of the loss, over about twenty steps
_DIVERGED = 4  # times the smallest smoothed loss so far: the test ends, as in fastai
_FEWEST = 10  # steps below which no slope can be read


class RangeTest(NamedTuple):
    """The training loss at each step of a range test, up to the step at which it diverged."""

    rates: np.ndarray  # f64[n], growing
    losses: np.ndarray  # f64[n], of the batch of each step
    smoothed: np.ndarray  # f64[n], their moving average


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
    steps = steps or _STEPS
    if not 0 < low < high < math.inf:
        raise UsageError(f"--low={low:g} --high={high:g}: give two learning rates, 0 < low < high")
    if steps < _FEWEST:
        raise UsageError(f"--steps={steps}: a range test takes at least {_FEWEST} steps")
    trial = config.copy_and_resolve_references()
    trial.total = f"{steps} steps"
    trial.on_bad_step = "stop"  # a step that is skipped has no loss, and the next one its rate
    trial.schedule = str(spec.Call(f"{__name__}:ramp", (low, high)))
    test = measure(trial, low, high)
    steepest, lowest = suggest(test)
    schedule = _with_rate(config.schedule, steepest)
    said = f"the loss falls fastest at {steepest:.2g}, and is lowest at {lowest:.2g}"
    said += f"\ntry --config.schedule={schedule!r}" if schedule else ""
    if format == "json":
        terminal.print_json({"suggestion": steepest, "lowest": lowest, "schedule": schedule,
                             "learning_rates": test.rates.tolist(), "losses": test.losses.tolist(),
                             "smoothed": test.smoothed.tolist()})  # fmt: skip
    else:
        print(f"{'learning rate':>13}  {'loss':>10}")
        for i in np.unique(np.linspace(0, len(test.rates) - 1, 12).astype(int)):
            print(f"{test.rates[i]:>13.2e}  {test.smoothed[i]:>10.4g}")
        print(said)
    if html:
        pages.write(paths.as_path(html), page(test, config, said))
    return 0


def measure(config: ConfigDict, low: float, high: float) -> RangeTest:
    """Trains from the initial weights, or those of `init_from`, until the loss diverges or the steps end."""
    programs.check(config)
    images = datasets.open_train_images(config)
    compiled = programs.programs_for_images(config, images, load=load_teacher)
    compiled.check_size()
    rates, losses, smoothed = np.geomspace(low, high, compiled.recipe.total), list[float](), list[float]()
    average = 0.0
    for step, loss in enumerate(_losses(compiled, images), 1):
        if not math.isfinite(loss):
            break
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        losses.append(loss)
        smoothed.append(average / (1 - _SMOOTHING**step))  # bias-corrected as in Adam
        if smoothed[-1] > _DIVERGED * min(smoothed) > 0:
            break
    if len(losses) < _FEWEST:
        raise UserError(f"the loss diverges after {len(losses)} steps, at a learning rate of {rates[len(losses)]:.2g}; "
                        "give a smaller --low")  # fmt: skip
    return RangeTest(rates[: len(losses)], np.array(losses), np.array(smoothed))


def _losses(compiled: Programs, images: stream.Images) -> Iterator[float]:
    """The mean training loss of each step, over the seeds if there are several."""
    weights = pretrained.load(compiled).taken if compiled.recipe.config.init_from else None
    state = compiled.init_state(compiled.first_images(images), weights)
    total = compiled.recipe.total
    for _, batch in terminal.track(compiled.batches(images, range(total)), total, "training"):
        state, sums = compiled.train(state, compiled.zero_sums(), batch)
        done = jax.device_get(sums)
        yield float(np.sum(done["loss"]) / np.sum(done["examples"]))


def suggest(test: RangeTest) -> tuple[float, float]:
    """Returns the learning rate at which the smoothed loss falls fastest per decade, and that of its minimum.

    The former is below the latter, beyond which training gets worse. The first tenth of the steps is left out, as in
    fastai: the average of few losses follows their noise. Raises UserError if the loss falls nowhere.
    """
    first, last = len(test.rates) // 10, int(np.argmin(test.smoothed))
    if last <= first:
        raise UserError("the loss never falls, so the range test suggests no learning rate; check the data and the "
                        "model, or give a smaller --low")  # fmt: skip
    slopes = np.gradient(test.smoothed, np.log10(test.rates))[first : last + 1]
    return float(test.rates[first + int(np.argmin(slopes))]), float(test.rates[last])


def _with_rate(schedule: str, rate: float) -> str:
    """The schedule's spec with another peak: its first argument, or `peak`. "" for a schedule of the user's own."""
    call = spec.parse_one(schedule)
    if call.name not in schedules.SCHEDULES:
        return ""
    rate = float(f"{rate:.2g}")
    if "peak" in call.kwargs:
        return str(spec.Call(call.name, call.args, {**call.kwargs, "peak": rate}))
    return str(spec.Call(call.name, (rate, *call.args[1:]), call.kwargs))


def page(test: RangeTest, config: ConfigDict, said: str) -> str:
    """The loss over the learning rate, with the lines of `said`, as one HTML file without scripts."""
    x = np.log10(test.rates).tolist()
    lines = [Line("loss of each step", 1, list(zip(x, test.losses.tolist(), strict=True))),
             Line("smoothed", 0, list(zip(x, test.smoothed.tolist(), strict=True)))]  # fmt: skip
    curve = chart("training loss", "log10 of the learning rate", lines, description=said.split("\n")[0])
    title = f"Learning-rate range test of {config.model}"
    return pages.document(title, [
        f"<h1>{pages.text(title)}</h1>", *map(pages.paragraph, said.split("\n")),
        pages.legend([(line.name, line.color, False) for line in lines]),
        pages.charts([("training loss", curve)]),
        pages.paragraph(f"optimizer={config.optimizer!r}, batch_size={config.batch_size}, seed={config.seed}", True),
    ])  # fmt: skip
