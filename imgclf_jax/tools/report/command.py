"""The command `report`: a self-contained HTML page about a trained run."""

import dataclasses
import logging
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import jaxprs
from imgclf_jax.optim import rules
from imgclf_jax.recipe import check_names
from imgclf_jax.run import record
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.pages.html import write
from imgclf_jax.tools.report import page as report_page
from imgclf_jax.tools.report.findings import Findings, find
from imgclf_jax.train.leakage import selecting_sets
from imgclf_jax.trained import restore

log = logging.getLogger(__name__)


def main(config: ConfigDict, workdir: Workdir, checkpoint: str, html: str) -> int:
    """Writes the page about the run in `workdir` to the file `html`, or to WORKDIR/report.html.

    The page omits sections that need missing data, or a model before the first checkpoint, and says so. Raises
    UserError for a missing `checkpoint`.
    """
    check_names(config)
    run = record.read(workdir.path)
    names: tuple[str, ...] = ()
    if checkpoint or workdir.last_checkpoint() is not None:
        model = restore(config, workdir, checkpoint)
        names = model.class_names
        if model.programs.recipe.method.predicts:
            findings = find(model, run.config, run.evals)
        else:
            sentence = f"method={config.method!r} trains no head, so this page omits everything that needs predictions."
            findings = Findings(step=model.step, missing=(sentence,))
        recipe = model.programs.recipe
        findings = dataclasses.replace(
            findings, parameters=rules.parameters_by_module(recipe.parameters),
            flops=jaxprs.matmul_flops(jaxprs.forward(recipe.model, recipe.data.image_shape)),
        )  # fmt: skip
    else:
        findings = Findings(missing=("There is no checkpoint yet, so this page omits everything that needs a model.",))
    doubts = []
    if modules := workdir.changed_modules():
        doubts.append(
            f"Code has changed since the run trained ({', '.join(modules)}): the numbers need not be the run's."
        )
    if others := _other_values(run.config, config):
        doubts.append(
            f"This page has other values than the run: {'; '.join(others)}. Its scores need not be the run's."
        )
    for sentence in (*doubts, *findings.missing):
        log.warning("%s", sentence)
    chosen = [f"{key} selects on the set {name}: its scores on this page are not those of new data."
              for name, key in selecting_sets(run.config).items()]  # fmt: skip
    findings = dataclasses.replace(findings, missing=(*doubts, *chosen, *findings.missing))
    path = Path(html) if html else workdir.path / "report.html"
    write(path, report_page.page(run, findings, names))
    print(f"wrote {path}")
    return 0


def _other_values(recorded: ConfigDict, config: ConfigDict) -> list[str]:
    """A line for each key that the command line has changed, and for each evaluation set that is no longer the run's.

    New sets are shown as what they are, and further metrics as well.
    """
    keys = configs.difference(recorded, config, ("data.eval", *configs.FREE_KEYS))
    old, new = recorded.data.eval, config.data.eval
    return keys + [f"data.eval.{name}: {old[name]!r} → {new[name]!r}" for name in old if old[name] != new.get(name)]
