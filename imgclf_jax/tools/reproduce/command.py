"""The command `reproduce`: trains a run again from its record, and compares every digest and metric with it."""

import contextlib
import dataclasses
import json
import logging
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import config as configs
from imgclf_jax.core import places, processes
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.run.provenance import pin_groups
from imgclf_jax.run.record import Record
from imgclf_jax.run.terminal import print_table
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.reproduce.reproduction import ROUNDING, Comparison, Difference, compare, differences, verdict
from imgclf_jax.train import loop as train

log = logging.getLogger(__name__)

_SHOWN = 12  # differences in a table


def main(
    config: ConfigDict, record: Record, output: str, steps: int | None, tolerance: float, format: str, bundle: str
) -> int:
    """Trains the run of `record` again, by `config`, and prints what differs; 0 if it is the same, 1 if it is not.

    All recorded steps are trained, or the first `steps`, into the directory `output`. Without one it is a temporary
    directory, which is kept if anything differs. With `bundle` nothing is trained: that file is written. Gives 75 if a
    signal stopped it.
    """
    if "digests.jsonl" in record.files and not record.digests:  # a line is written before the first step is trained
        raise UserError(f"digests.jsonl of {record.path} is damaged: it holds no record; restore the file from a copy "
                        "of the run or from its bundle")  # fmt: skip
    if bundle:
        return _pack(record, bundle)
    end = _end(record, steps)
    folder = places.as_path(processes.broadcast_from_process_0("naming the output", lambda: _folder(record, output)))
    found = _changed(record.config, config)
    config = pin_groups(config, record.config.mesh, record.provenance)
    wrong = record.contradictions
    for sentence in wrong:
        log.warning("the record contradicts itself: %s", sentence)
    config.tensorboard, config.writers = False, ""

    def adjusted(run: train.Run) -> train.Run:
        """The run up to `end`; what differs from the recorded one is known by now, and said before hours of work."""
        if (total := run.cadences.total) < end:
            raise UserError(f"total={config.total!r} is {total} steps, and the run in {record.path} has recorded "
                            f"{end}; pass --steps={total}, or a longer total")  # fmt: skip
        found.extend(differences(record.provenance, Record.named(str(run.workdir.path)).provenance))
        for one in found[:_SHOWN]:
            log.warning("%s differs: %s was %s, here it is %s", one.kind, *one[1:])
        return dataclasses.replace(run, cadences=dataclasses.replace(run.cadences, end=end))

    recorded, told = {line["step"]: line.get("params_sha256") for line in record.digests}, False

    def noted(step: int, digest: str) -> None:
        """Says at the first step whose parameters differ that they do: hours may follow it."""
        nonlocal told
        if not told and recorded.get(step) not in (None, digest):
            told = True
            log.warning("the parameters of step %d differ from the recorded ones; to see which without the steps that "
                        "follow, end this by Ctrl-C and pass --steps=%d", step, max(step, 1))  # fmt: skip

    try:
        with contextlib.redirect_stdout(sys.stderr):
            status = train.main(config, Workdir(folder), adjusted=adjusted, noted=noted)
    except UserError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing had been written
        raise
    processes.barrier("comparing")  # by then the first one has written all
    here = Record.named(str(folder))
    if status not in (0, train.STOPPED) or max((line["step"] for line in here.digests), default=-1) < end:
        log.warning("stopped before step %d, nothing is compared; go on by --output=%s", end, folder)
        return status or 1
    extended = [one["step"] for one in record.provenance.get("extended", [])]
    changed = any(one["step"] for one in record.provenance.get("changed", []))
    recorded_files = (record.digests, record.metrics, record.result)
    compared = compare(recorded_files, (here.digests, here.metrics), extended, changed)
    if not (compared.digest_steps or compared.values):
        raise UserError(f"nothing that {record.path} has recorded up to step {end} can be compared; pass more --steps")
    word = "contradictory" if wrong else verdict(compared, found, tolerance)
    kept = bool(output) or word != "same"
    if processes.index() == 0:
        if format == "json":
            as_json = _as_json(word, end, compared, found, str(folder) if kept else None)
            print(json.dumps(as_json | {"contradictions": wrong}, indent=2))
        else:
            for sentence in wrong:
                print(f"{sentence[0].upper()}{sentence[1:]}.")
            _print(word, end, compared, found, record, tolerance)
            if kept:
                print(f"the run that was trained to compare is in {printable(str(folder))}")
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if word in ("same", "tolerated") else 1


def _pack(record: Record, bundle: str) -> int:
    if record.bundled:
        raise UserError(f"{record.path} is a bundle already; --bundle packs a work directory")
    if not record.digests:
        log.warning("%s has no digests of its checkpoints: the bundle has the last one and the metrics", record.path)
    if not processes.index():
        record.pack(places.as_path(bundle))
        print(f"{printable(bundle)} holds what `reproduce {printable(bundle)}` needs, but for data and code; "
              "provenance.json in it names folders of this machine")  # fmt: skip
    return 0


def _end(record: Record, steps: int | None) -> int:
    """The last step to train."""
    known = [line["step"] for line in (*record.digests, *record.metrics, record.result) if "step" in line]
    last = max((step for step in known if isinstance(step, int)), default=0)
    if not last:
        raise UserError(f"{record.path} has recorded no step; there is nothing to compare with")
    if steps and steps > last:
        raise UserError(f"--steps={steps}: the run in {record.path} has recorded {last} steps")
    return steps or last


def _folder(record: Record, output: str) -> str:
    if not output and processes.count() > 1:
        raise UserError("reproduce in several processes wants --output, a directory that all of them share")
    if not output:
        return tempfile.mkdtemp(prefix="reproduce-")
    place = places.as_path(output)
    if not places.in_bucket(place) and place.resolve() == Path(record.path).resolve():
        raise UserError(f"--output={output} is the run itself; name another directory")
    return output


def _changed(old: ConfigDict, new: ConfigDict) -> list[Difference]:
    """Each key that was given another value and decides what is computed.

    The data may lie elsewhere, under another `data.source`: whether they are the same their fingerprint says.
    """
    a, b = configs.flatten(old), configs.flatten(new)
    keys = [key for key in configs.KEYS if key not in configs.LOCATION_KEYS and a[key] != b[key]]
    return [Difference("place" if key == "data.source" else "config", key, repr(a[key]), repr(b[key])) for key in keys]


_SENTENCES = {
    "same": "The same, bit for bit",
    "tolerated": "The same within --tolerance={tolerance:g}, though not bit for bit",
    "rounding": "The same up to rounding: only versions, devices or flags differ, and no metric by more than {most:g}",
    "different": "Different from step {first} on",
    "contradictory": "The record contradicts itself, so no run can be the same",
}


def _print(
    word: str, end: int, compared: Comparison, found: list[Difference], record: Record, tolerance: float
) -> None:
    largest = compared.largest
    sentence = _SENTENCES[word].format(tolerance=tolerance, most=ROUNDING, first=compared.first_step)
    by_most = f" (largest relative difference of a metric: {largest.relative:.2g})" if largest else ""
    print(f"{sentence}{by_most}.")
    digests, values, metric_steps = len(compared.digest_steps), len(compared.values), compared.metric_steps
    print(f"Compared up to step {end}: all parameters at {digests} steps, and {values} values of metrics at "
          f"{metric_steps} steps.")  # fmt: skip
    if not record.digests:
        print("The run was made before digests were recorded: that of result.json and the metrics are compared alone.")
    if compared.missing:
        step, name = compared.missing[0]
        print(f"{len(compared.missing)} recorded values were not found again, the first is {name} at step {step}.")
    rows = []
    if of := compared.parameters:
        until = "" if of.equal_until is None else f"; equal at step {of.equal_until}"
        what = f"{of.names[0]}, and {len(of.names) - 1} more of {of.of}" if of.names else "not known which"
        rows.append(["parameters", str(of.step), what + until, of.recorded, of.here])
    for name, value in (("first metric", compared.first_value), ("metric that differs most", largest)):
        if value:
            rows.append([name, str(value.step), value.name, f"{value.recorded:.9g}", f"{value.here:.9g}"])
    if rows:
        print_table(["what differs", "step", "name", "recorded", "here"], rows)
    if found:
        print_table(["what else differs", "", "recorded", "here"], [list(one) for one in found[:_SHOWN]])
        if len(found) > _SHOWN:
            print(f"and {len(found) - _SHOWN} more, which --format=json lists")
    elif rows:
        print("Nothing else that is recorded differs. Code of your own, files of installed packages, and kernels that "
              "are not deterministic are not recorded.")  # fmt: skip


def _as_json(word: str, end: int, compared: Comparison, found: list[Difference], output: str | None) -> dict[str, Any]:
    def value(of: Any) -> dict[str, Any] | None:
        """A metric; `relative` is null where only one of both is finite."""
        return of and of._asdict() | {"relative": of.relative if math.isfinite(of.relative) else None}

    return {
        "verdict": word,
        "step": end,
        "compared": {"digests": list(compared.digest_steps), "metrics": len(compared.values)},
        "first_step": compared.first_step,
        "missing": [{"step": step, "name": name} for step, name in compared.missing],
        "parameters": compared.parameters and compared.parameters._asdict(),
        "first_metric": value(compared.first_value),
        "largest_metric": value(compared.largest),
        "differences": [one._asdict() for one in found],
        "output": output,
    }
