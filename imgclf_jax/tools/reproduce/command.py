"""The command `reproduce`: trains a run again from its record, and compares every digest and metric."""

import contextlib
import dataclasses
import io
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import paths, processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.stopping import STATUS_SAVED
from imgclf_jax.core.terminal import print_json, print_table, print_text
from imgclf_jax.core.text import printable
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.run.cadences import Cadences
from imgclf_jax.run.provenance import Difference, find_differences
from imgclf_jax.run.record import Record
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.reproduce import reproduction
from imgclf_jax.tools.reproduce.reproduction import ROUNDING, Comparison
from imgclf_jax.tools.reproduce.seeds import Spread, find_spread
from imgclf_jax.train import command as train

log = logging.getLogger(__name__)


def main(
    config: ConfigDict, record: Record, output: str, steps: int | None, tolerance: float, format: str, bundle: str
) -> int:
    """Trains the run of `record` again with `config`, and prints the differences.

    - `output` is the directory to train in; "" uses a temporary one, which is kept if anything differs.
    - `steps` is the number of steps to train; None trains all recorded steps.
    - `bundle` only writes the record to this file, without training.

    Returns 0 if the runs are equal, 1 if not, and 75 if a signal stops training.
    """
    if not record.digests:  # a line is written before the first step is trained
        raise UserError(f"digests.jsonl of {record.path} is missing or empty, so no parameters can be compared; "
                        "restore the file from a copy of the run or from its bundle")  # fmt: skip
    if bundle:
        return _pack(record, bundle)
    end, recorded = _last_step(record, steps), _last_step(record, None)
    folder = paths.as_path(processes.broadcast(lambda: _folder(record, output)))
    found, cadences = _compare_configs(record.config, config), list[Cadences]()
    config.tensorboard, config.writers = False, ""

    def end_early(run: train.Run) -> train.Run:
        """Ends the run at `end`, and logs the known differences before hours of training."""
        if (total := run.cadences.total) < end:
            raise UserError(f"total={config.total!r} is {total} steps, but the run in {record.path} recorded {end}; "
                            f"pass --steps={total}, or a longer total")  # fmt: skip
        processes.broadcast(lambda: _check_earlier(run, output))
        found.extend(reproduction.list_differences(record.snapshots, run.snapshot))
        for difference in found:
            log.warning("%s differs: %s", difference.kind, difference)
        if run.start >= end:
            log.warning("--output=%s has been trained up to step %d before, by the present code: it is compared "
                        "without training; to train, delete it", output, run.start)  # fmt: skip
        cadences.append(run.cadences)
        return dataclasses.replace(run, cadences=dataclasses.replace(run.cadences, end=end))

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what to do next with a run that may be removed
            status = train.main(config, Workdir(folder), transform_run=end_early)
    except UserError as e:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        e.args = (str(e).replace("--workdir", "--output"),)  # the flag of `train`
        raise
    processes.barrier()  # process 0 has written everything
    here = Record.load(str(folder))
    if status not in (0, STATUS_SAVED) or max((line["step"] for line in here.digests), default=-1) < end:
        log.warning("stopped before step %d without comparing; continue with --output=%s", end, folder)
        return status or 1
    moved = any(one.get("keys") != record.provenance.get("keys") for one in record.snapshots)
    result = {name: record.result.get(name) for name in ("step", "params_sha256", *record.config.data.eval)}
    compared = reproduction.compare((record.digests, record.metrics, result), (here.digests, here.metrics), moved)
    changed = moved or any(one.kind == "config" for one in found)

    def due(step: int) -> bool:  # a digest
        planned, best = cadences[0].due(step), bool(config.checkpoint.best)
        return step & (step - 1) == 0 or (not changed and (planned.checkpoint or (planned.eval and best)))

    ended = bool(record.result) or recorded >= cadences[0].total
    until = end if ended else min(end, recorded - 1)  # a kill may take the records of the last step
    absent = reproduction.find_absent(
        (record.digests, record.metrics), (here.digests, here.metrics), due, until, changed
    )
    absent = absent if record.snapshots else ((0, "provenance.json"), *absent)
    absent = (*absent, (end, "result.json")) if ended and end == recorded and not record.result else absent
    compared = dataclasses.replace(compared, absent=absent)
    if not (compared.digest_steps or compared.values):
        raise UserError(f"{record.path} has no digest or metric up to step {end} to compare; pass more --steps")
    word = reproduction.verdict(compared, found, tolerance)
    spread = None if word == "same" else find_spread(record, here.result)
    kept = bool(output) or word != "same"
    if processes.index() == 0:
        if format == "json":
            print_json(_as_json(word, end, compared, found, spread, str(folder) if kept else None))
        else:
            _print(word, end, compared, found, tolerance)
            if spread:
                print_text(f"{spread}.")
            if kept:
                print(f"the new run is in {printable(str(folder))}")
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if word in ("same", "tolerated") else 1


def _pack(record: Record, bundle: str) -> int:
    if record.path.is_file():
        raise UserError(f"{record.path} is a bundle already; --bundle packs a work directory")
    if not processes.index():
        record.pack(paths.as_path(bundle))
        print_text(f"{bundle} has everything that `reproduce {bundle}` needs, except data and code; "
              "its provenance.json names folders of this machine")  # fmt: skip
    return 0


def _last_step(record: Record, steps: int | None) -> int:
    """Returns the last step to train."""
    known = [line["step"] for line in (*record.digests, *record.metrics, record.result) if "step" in line]
    last = max((step for step in known if isinstance(step, int)), default=0)
    if not last:
        raise UserError(f"{record.path} has recorded no step, so there is nothing to compare with")
    if steps and steps > last:
        raise UserError(f"--steps={steps}: must be at most {last}, the steps that the run in {record.path} recorded")
    return steps or last


def _folder(record: Record, output: str) -> str:
    if not output:
        if processes.count() > 1:
            raise UserError("reproduce in several processes needs --output, a directory that they share")
        return tempfile.mkdtemp(prefix="reproduce-")
    path = paths.as_path(output)
    if not paths.in_bucket(path) and path.resolve() == Path(record.path).resolve():
        raise UserError(f"--output={output} is the run itself; name another directory")
    return output


def _check_earlier(run: train.Run, output: str) -> None:
    """Raises UserError if other code or another environment trained the first steps of the run in the output."""
    for snapshot in run.workdir.read_snapshots() if run.start else ():
        for one in find_differences(snapshot, run.snapshot):
            if one.kind in ("code", "version", "device", "flags"):
                raise UserError(f"--output={output} has been trained up to step {run.start} otherwise: {one}; delete "
                                "it, or name another directory")  # fmt: skip


def _compare_configs(old: ConfigDict, new: ConfigDict) -> list[Difference]:
    """Lists the changed keys that affect the computation.

    A changed `data.source` only counts as another place, because fingerprints tell whether the data are the same.
    """
    a, b = configs.flatten(old), configs.flatten(new)
    keys = [key for key in configs.KEYS if key not in configs.LOCATION_KEYS and a[key] != b[key]]
    return [Difference("place" if key == "data.source" else "config", key, repr(a[key]), repr(b[key])) for key in keys]


_SENTENCES = {
    "same": "The same, bit for bit",
    "tolerated": "The same within --tolerance={tolerance:g}, but not bit for bit",
    "incomplete": "The record is incomplete; what it has is the same",
    "rounding": "The same up to rounding: only versions, devices or flags differ, and no metric by more than {most:g}",
    "different": "Different from step {first} on",
}


def _print(word: str, end: int, compared: Comparison, found: list[Difference], tolerance: float) -> None:
    largest = compared.largest
    sentence = _SENTENCES[word].format(tolerance=tolerance, most=ROUNDING, first=compared.first_step)
    by_most = f" (largest relative difference of a metric: {largest.relative:.2g})" if largest else ""
    print_text(f"{sentence}{by_most}.")
    digests, values, steps = len(compared.digest_steps), len(compared.values), len({v.step for v in compared.values})
    print_text(
        f"Compared up to step {end}: all parameters at {digests} steps, and {values} metric values at {steps} steps."
    )
    for step, name in compared.missing[:1]:
        print_text(f"{len(compared.missing)} recorded values are missing, the first is {name} at step {step}.")
    for step, name in compared.absent[:1]:
        print_text(f"The record lacks {len(compared.absent)} of the values here; the first is {name} at step {step}.")
    rows = []
    if params := compared.parameters:
        until = "" if params.equal_until is None else f"; equal at step {params.equal_until}"
        names = f"{params.names[0]}, and {len(params.names) - 1} more of {params.of}" if params.names else "unknown"
        rows.append(["parameters", str(params.step), names + until, params.recorded, params.here])
    if value := compared.first_value:
        rows.append(["first metric", str(value.step), value.name, f"{value.recorded:.9g}", f"{value.here:.9g}"])
    if rows:
        print_table(["what differs", "step", "name", "recorded", "here"], rows)
    if found:
        print_table(["what else differs", "", "recorded", "here"], [list(one) for one in found])


def _as_json(
    word: str, end: int, compared: Comparison, found: list[Difference], spread: Spread | None, output: str | None
) -> JsonObject:  # fmt: skip
    def value(of: Any) -> JsonObject | None:
        return of and of._asdict() | {"relative": of.relative}  # which `_asdict` omits

    return {
        "verdict": word,
        "step": end,
        "compared": {"digests": list(compared.digest_steps), "metrics": len(compared.values)},
        "first_step": compared.first_step,
        "missing": [{"step": step, "name": name} for step, name in compared.missing],
        "absent": [{"step": step, "name": name} for step, name in compared.absent],
        "parameters": compared.parameters and compared.parameters._asdict(),
        "first_metric": value(compared.first_value),
        "largest_metric": value(compared.largest),
        "spread": spread and spread._asdict(),
        "differences": [one._asdict() for one in found],
        "output": output,
    }
