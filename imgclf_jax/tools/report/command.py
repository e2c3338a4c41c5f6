"""The command `report`: a trained run as one HTML page, which needs no network and no script."""

import dataclasses
import logging
from pathlib import Path

from ml_collections import ConfigDict

from imgclf_jax.core import processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.recipe import check_names
from imgclf_jax.run import record
from imgclf_jax.run.provenance import read_json
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.pages.html import write
from imgclf_jax.tools.report import page as report_page
from imgclf_jax.tools.report.findings import Findings, find
from imgclf_jax.trained import restore

log = logging.getLogger(__name__)


def main(config: ConfigDict, workdir: Workdir, checkpoint: str, html: str) -> int:
    """Writes the page of the run in `workdir` to the file `html`, or to report.html beside its checkpoints.

    What cannot be found is left out, and the page says so: the parts that need data where these are gone, those that
    need a trained model where there is no checkpoint yet. Raises UserError for a checkpoint that is not there.
    """
    check_names(config)
    run = record.read(workdir.path)
    names: tuple[str, ...] = ()
    if checkpoint or workdir.has_checkpoints():
        model = restore(config, workdir, checkpoint)
        names = model.class_names
        if model.programs.recipe.method.predicts:
            findings = find(model, run.config, run.evals)
        else:
            sentence = f"method={config.method!r} trains no head, so all that needs predictions is left out."
            findings = Findings(step=model.step, missing=(sentence,))
            log.info("%s", sentence)
    else:
        findings = Findings(missing=("There is no checkpoint yet, so all that needs a trained model is left out.",))
        log.warning("%s", findings.missing[0])
    if run.contradictions:
        sentence = f"What the run has recorded contradicts itself: {'; '.join(run.contradictions)}."
        findings = dataclasses.replace(findings, missing=(sentence, *findings.missing))
        log.warning("%s", sentence)
    provenance = read_json(workdir.provenance) if workdir.provenance.is_file() else {}
    if not isinstance(provenance, dict):
        raise UserError(f"{workdir.provenance} is damaged: it holds no object")
    path = Path(html) if html else workdir.path / "report.html"
    if not processes.index():
        write(path, report_page.page(run, provenance, findings, names))
        print(f"written: {path}")
    return 0
