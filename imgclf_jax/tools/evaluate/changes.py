"""What has changed since a run was trained: its examples, and the user's own code."""

import contextlib
import logging
from collections.abc import Mapping

from ml_collections import ConfigDict

from imgclf_jax.core.errors import UserError
from imgclf_jax.data import sources, stream
from imgclf_jax.data.source import Source
from imgclf_jax.programs import Programs
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.train.leakage import overlap_warnings

log = logging.getLogger(__name__)


def data_changes(
    programs: Programs, run: ConfigDict, recorded: Mapping[str, str], base: dict[str, Source],
    evals: Mapping[str, stream.Images],
) -> list[str]:  # fmt: skip
    """A sentence for each set of examples that has changed since the training of the config `run`.

    `recorded` are its fingerprints of the evaluation sets `evals`, and `base` the splits of the present source.
    """
    found, now = [], programs.recipe.config.data
    if now.source == run.data.source:
        with contextlib.suppress(UserError):  # the training split may be gone, and only the evaluation sets are needed
            if sources.take_split(base, run.data.train).fingerprint != programs.recipe.data.fingerprint:
                found.append("the data have changed since training: examples trained on may now be in an evaluation "
                             "set")  # fmt: skip
    for name, images in evals.items():
        alike = (now.source, now.eval[name]) == (run.data.source, run.data.eval.get(name))
        if alike and name in recorded and images.source.fingerprint != recorded[name]:
            found.append(f"the evaluation set {name} has changed since training: its metrics are not those that the "
                         "run recorded")  # fmt: skip
    return found


def compare_with_record(
    programs: Programs, workdir: Workdir, base: dict[str, Source], evals: Mapping[str, stream.Images]
) -> None:
    """Warns of changed code and data, and of evaluation sets that share examples with training."""
    workdir.warn_of_changed_modules()  # those of the data too, which are open by now
    trained, recorded = workdir.load_config(), next(iter(workdir.read_snapshots()), {}).get("evals", {})
    for sentence in (*data_changes(programs, trained, recorded, base, evals),
                     *overlap_warnings(trained, programs.recipe.config.data, base)):  # fmt: skip
        log.warning("%s", sentence)
