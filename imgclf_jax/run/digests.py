"""digests.jsonl: digests of the parameters at some steps, to compare other runs with this one.

A line is {"step": 11, "params_sha256": "…", "params": {"backbone/…/kernel": "0f3a91c2", …}}. The SHA-256 is computed as
in `result.json`. A CRC-32 per parameter tells which ones differ. Lines outlive their checkpoints.
"""

import concurrent.futures
import logging
import re
from pathlib import Path

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from imgclf_jax.core import jaxprs, processes, sharding, tree
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.typing import Params
from imgclf_jax.run import writers
from imgclf_jax.run.workdir import Workdir

log = logging.getLogger(__name__)


def check(workdir: Workdir, step: int, params: Params) -> None:
    """Raises UserError if `params`, from the checkpoint of `step`, differ from those in the line of digests.jsonl.

    Warns if there is none, although a run writes one for each checkpoint. All processes call this.
    """

    def find() -> str | None:
        return next((line.get("params_sha256") for line in writers.read_metrics(workdir.digests)
                     if line["step"] == step), None)  # fmt: skip

    recorded, checkpoint = processes.broadcast(find), workdir.checkpoints / str(step)
    if recorded is None:
        log.warning("%s has no line for step %d, so it is not known whether checkpoint %s is this run's",
                    workdir.digests, step, checkpoint)  # fmt: skip
    elif recorded != tree.sha256(params):
        raise UserError(
            f"checkpoint {checkpoint} holds other parameters than {workdir.digests} records for step {step}: one of "
            "them is from another run; restore it, or remove the checkpoint to use an older one"
        )


class Digests:
    """Writes digests.jsonl in `folder` for a run from step `start` to step `last`.

    Lines from `start` on are dropped and written again. The training thread copies the parameters to the host; another
    thread hashes and writes them. All processes call the methods, and process 0 writes.
    """

    def __init__(self, folder: Path, start: int, last: int):
        # Powers of two locate the first differing step within a factor of two, however rare checkpoints are.
        self.edges = (*(1 << n for n in range(last.bit_length())), last)
        self._path = folder / "digests.jsonl"
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="digests")
        self._writing: concurrent.futures.Future[str] | None = None
        self._step = -1  # of the last line
        self._file: writers.AppendedFile | None = None
        if not processes.index():
            lines = [writers.to_line(x) for x in writers.read_metrics(self._path) if x["step"] < start]
            self._file = writers.AppendedFile(self._path, b"".join(lines))

    def record(self, step: int, params: Params) -> None:
        """Writes the line of a step, once. The caller may donate the parameters' buffers right away.

        Raises UserError if the previous line could not be written.
        """
        if step == self._step:
            return
        self.sha256()  # waits, so that at most one copy is in memory
        self._step = step
        for leaf in jax.tree.leaves(params):
            if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and not processes.index():
                leaf.copy_to_host_async()
        fetched = [(name, sharding.fetch(leaf)) for name, leaf in tree.named_leaves(params)]
        if self._file:
            # On CPU a fetched array is a view of a buffer that the next step overwrites.
            named = [(name, array if array.flags.owndata else array.copy()) for name, array in fetched]
            self._writing = self._thread.submit(self._write, step, named, self._file)

    def _write(self, step: int, named: list[tuple[str, np.ndarray]], file: writers.AppendedFile) -> str:
        sha256, each = tree.digests(named)
        file.write(writers.to_line({"step": step, "params_sha256": sha256, "params": each}))
        file.flush()
        return sha256

    def sha256(self) -> str:
        """The SHA-256 in the last line, once it is written; "" except in process 0."""
        return self._writing.result() if self._writing else ""

    def close(self) -> None:
        """Closes the file. Raises nothing: `record` and `sha256` have raised any errors."""
        self._thread.shutdown()
        if self._file:
            self._file.close()


def digest_program(jaxpr: ClosedJaxpr) -> str:
    """A SHA-256 of a program and its constants, the same in any process that traces the same code."""
    text = re.sub(r"0x[0-9a-f]{6,}", "", str(jaxpr))  # the addresses of functions
    constants = (constant for one in jaxprs.walk(jaxpr) for constant in getattr(one, "consts", ()))
    return tree.sha256([np.frombuffer(text.encode(), np.uint8), *constants])
