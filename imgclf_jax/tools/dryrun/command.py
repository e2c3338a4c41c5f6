"""The command `dryrun`: compiles a run for absent chips, without data, and reports its memory and time."""

import logging
import re
import time
from typing import Any

from ml_collections import ConfigDict

from imgclf_jax import losses
from imgclf_jax.core import jaxprs, json_files, machine, sharding, terminal
from imgclf_jax.core.machine import format_bytes
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.data import placement
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe, check_names
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.dryrun import counts, described, topology
from imgclf_jax.tools.dryrun.table import CHIPS, Chip
from imgclf_jax.trained import load_teacher

log = logging.getLogger(__name__)

_FULL = re.compile(r"RESOURCE_EXHAUSTED|CompileTimeHbmOom|out of memory", re.IGNORECASE)
_ADVICE = ("try gradient accumulation (accumulate=2), a smaller batch_size, precision='bfloat16', a model with "
           "remat='block', or sharded parameters (mesh='data=-1, fsdp=8')")  # fmt: skip


def main(config: ConfigDict, workdir: Workdir, chips: str, shape: str, format: str, **facts: int | None) -> int:
    """Prints the report in this `format` and writes it to the work directory. Returns 1 if the run does not fit.

    `shape` and `facts` describe absent data (see `described.describe`). Call `topology.prepare_from_flags` before
    importing JAX.
    """
    terminal.setup_logging()
    parsed = topology.parse(chips)
    mesh = sharding.make_mesh(topology.devices(parsed), config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
    check_names(config)
    needs_counts = losses.needs_class_counts(config.loss)
    data = described.describe(config, topology.parse_shape(shape), **facts, count_classes=needs_counts)
    result = report(Programs(Recipe(config, data, load_teacher), mesh), parsed)
    path = workdir.path / f"dryrun-{str(parsed).replace(':', '-')}.json"
    workdir.path.mkdir(parents=True, exist_ok=True)
    json_files.write(path, result)
    if format == "json":
        terminal.print_json(result)
    else:
        _print(result)
    log.info("wrote %s", path)
    return 0 if result["fits"] else 1


def report(programs: Programs, chips: topology.Chips) -> JsonObject:
    """Returns the memory and time of a run per chip as JSON values: bytes, seconds, operations.

    Devices of `cpu` have no figures, and so the report has no time.
    """
    recipe, chip = programs.recipe, CHIPS.get(chips.kind)
    config = recipe.config
    state, sums = programs.shape["state"], programs.shape["sums"]
    kept = (recipe.data, *recipe.data.extra.values()) if config.data.placement == "device" else ()
    tables = [placement.table_shape(one.train_examples, one.image_shape, len(one.target_names), programs.mesh)
              for one in kept]  # fmt: skip
    result: JsonObject = {
        "chips": str(chips), "model": config.model, "batch_size": config.batch_size, "accumulate": config.accumulate,
        "precision": config.precision, "steps": recipe.total,
        "memory": {
            "capacity": int(chip.memory) if chip else machine.memory() // chips.count,
            "parameters": counts.bytes_per_device((state.params, state.model_state)),
            "optimizer": counts.bytes_per_device(state.opt_state),
            "averages": counts.bytes_per_device((state.eval_variables, sums)),
            "batch": counts.bytes_per_device((programs.batch_shape, tables)),
        },
        "flops": jaxprs.matmul_flops(programs.traced_train.jaxpr) / chips.count, "compile_seconds": {},
    }  # fmt: skip
    compiled: dict[str, Any] = {}
    for name in ("train", "eval"):
        began = time.perf_counter()
        log.info("compiling %s", name)
        try:
            with programs.caching(name in ("train", "eval")):
                compiled[name] = getattr(programs, f"traced_{name}").lower().compile()
        except Exception as e:
            if not _FULL.search(str(e)):
                raise
            lines = [line.strip() for line in str(e).splitlines() if re.search(r"\d[KMGT]", line)]
            return result | {"fits": False, "program": name, "compiler": (lines or str(e).splitlines())[0][:300]}
        result["compile_seconds"][name] = round(time.perf_counter() - began, 1)
    code, sizes = compiled["train"].memory_analysis(), result["memory"]
    sizes |= {"temporaries": code.temp_size_in_bytes, "program": code.generated_code_size_in_bytes}
    sizes["peak"] = (code.argument_size_in_bytes + code.output_size_in_bytes - code.alias_size_in_bytes
                     + code.temp_size_in_bytes + code.generated_code_size_in_bytes)  # fmt: skip
    collectives = counts.collective_bytes(compiled["train"])
    traffic = (compiled["train"].cost_analysis() or {}).get("bytes accessed")  # of the loop over microbatches once
    result |= {
        "fits": sizes["peak"] <= sizes["capacity"],
        "bytes": traffic and float(traffic) * config.accumulate,
        "collectives": {kind: {"count": n, "bytes": size} for kind, (n, size) in collectives.items()},
    }
    return result | (_times(programs, chips, chip, result) if chip else {})


def _times(programs: Programs, chips: topology.Chips, chip: Chip, result: JsonObject) -> JsonObject:
    """Estimates the time of a step: that of the slowest of computation, memory and network (a roofline).

    Computation and network take at least as long. XLA's count of memory traffic includes on-chip memory, so memory may
    take less. For GPUs XLA counts none, so the time of a step is a lower bound.
    """
    config, n = programs.recipe.config, chips.count
    a_host = chips.shape[-1] if chip.platform == "gpu" else n  # links reach all chips of a TPU slice
    seconds = {
        "compute": result["flops"] / chip.peak(config.precision, config.matmul_precision),
        **({"memory": result["bytes"] / chip.bandwidth} if result["bytes"] else {}),
        "network": sum(collective_seconds(chip, n, a_host, kind, one["bytes"])
                       for kind, one in result["collectives"].items()),
    }  # fmt: skip
    step = max(seconds.values())
    run = step * programs.recipe.total
    return {
        "seconds": {**seconds, "step": step},
        "bound_by": max(seconds, key=lambda name: seconds[name]),
        "images_per_second": config.batch_size * config.num_seeds / step,
        "run_seconds": run,
        "chip_hours": run * n / 3600,
        "source": chip.source,
    }


def collective_seconds(chip: Chip, chips: int, a_host: int, kind: str, size: int) -> float:
    """Returns the time of a ring collective with a result of `size` bytes: each chip sends (n - 1) / n once or twice.

    Over several hosts with `a_host` chips each, it runs within the hosts and, on a chip's part, between them.
    """
    times = {"all-reduce": 2, "reduce-scatter": chips}.get(kind, 1)  # a reduce-scatter's `size` is one shard
    hosts = chips // a_host
    between = times * size / a_host * (hosts - 1) / hosts / chip.network if hosts > 1 else 0.0
    return times * size * (a_host - 1) / a_host / chip.links + between


def _print(result: JsonObject) -> None:
    sizes = result["memory"]
    print(f"{result['model']} on {result['chips']}, {result['batch_size']} images per step in {result['precision']}")
    rows = [(name, format_bytes(size)) for name, size in sizes.items() if name not in ("capacity", "peak")]
    if "peak" in sizes:
        rows.append(("peak memory", f"{format_bytes(sizes['peak'])} of {format_bytes(sizes['capacity'])}"))
    rows.append(("fits", "yes" if result["fits"] else "; ".join(["no", result.get("compiler", ""), _ADVICE])))
    rows.append(("matmul FLOPs", f"{result['flops']:.3g} per step and chip"))
    if result.get("bytes"):
        rows.append(("memory traffic", f"{format_bytes(result['bytes'])} per step and chip, by XLA's cost analysis"))
    rows += [(kind, f"{of['count']} per step, {format_bytes(of['bytes'])}")
             for kind, of in result.get("collectives", {}).items()]  # fmt: skip
    if "seconds" in result:
        seconds = result["seconds"]
        least, most = ("about", "about") if "memory" in seconds else ("at least", "at most")
        each = ", ".join(f"{name} {value * 1e3:.3g} ms" for name, value in seconds.items() if name != "step")
        rows += [("step", f"{least} {seconds['step'] * 1e3:.3g} ms, bound by {result['bound_by']}: {each}"),
                 ("images per second", f"{most} {result['images_per_second']:,.0f}"),
                 ("whole run", f"{least} {result['run_seconds'] / 3600:.3g} h for {result['steps']:,} steps, "
                               f"{result['chip_hours']:.3g} chip-hours, without evaluation"),
                 ("chip data", result["source"])]  # fmt: skip
    rows.append(("compile time", ", ".join(f"{name} {s} s" for name, s in result["compile_seconds"].items())))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        terminal.print_text(f"  {name:<{width}}  {text}")
