"""The command `dryrun`: compiles a run for absent chips, without data, and reports its memory and time."""

import logging
import re
import time
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from imgclf_jax import losses
from imgclf_jax.core import jaxprs, json_files, rng, sharding, terminal
from imgclf_jax.core.memory import format_bytes
from imgclf_jax.core.typing import JsonObject, PyTree
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe, check_names
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.step import OPTIMIZER
from imgclf_jax.tools.dryrun import counts, described, estimate, topology
from imgclf_jax.trained import load_teacher

log = logging.getLogger(__name__)

_PARTS = ("parameters", "optimizer", "averages", "batch")
_FULL = re.compile(r"RESOURCE_EXHAUSTED|CompileTimeHbmOom|out of memory", re.IGNORECASE)


def main(config: ConfigDict, workdir: Workdir, chips: str, shape: str, format: str, **facts: int | None) -> int:
    """Prints the report in this `format` and writes it to the work directory. Returns 1 if the run does not fit.

    `shape` and `facts` describe absent data (see `described.Facts`). Call `topology.prepare_from_flags` before
    importing JAX.
    """
    terminal.setup_logging()
    parsed = topology.parse(chips)
    mesh = sharding.make_mesh(topology.devices(parsed), config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
    check_names(config)
    known = described.Facts(topology.parse_shape(shape), **facts)
    data = described.describe(config, known, losses.needs_class_counts(config.loss))
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
    """Returns the memory and time of a run per chip as JSON values: bytes, seconds, operations."""
    recipe, chip = programs.recipe, estimate.chip_figures(chips)
    config, n = recipe.config, chips.count
    state, sums = programs.shape["state"], programs.shape["sums"]
    resident = {
        "parameters": counts.bytes_per_device((state.params, state.model_state)),
        "optimizer": counts.bytes_per_device(state.opt_state),
        "averages": counts.bytes_per_device((state.eval_variables, sums)),
        "batch": counts.bytes_per_device((programs.batch_shape, programs.tables_shape)),
    }
    flops = _matmul_flops_per_chip(programs)
    result: JsonObject = {
        "chips": str(chips), "source": chip.source, "model": config.model, "batch_size": config.batch_size,
        "accumulate": config.accumulate, "precision": config.precision, "steps": recipe.total,
        "memory": {"capacity": int(chip.memory), **resident}, "flops": flops, "compile_seconds": {},
    }  # fmt: skip
    compiled: dict[str, Any] = {}
    traced = {"init": programs.traced_init, "train": programs.traced_train, "eval": programs.traced_eval,
              "augment": _traced_augment(programs)}  # fmt: skip
    for number, name in enumerate(traced, 1):
        began = time.perf_counter()
        log.info("compiling %s (%d of %d)", name, number, len(traced))
        with programs.caching(name == "eval" or (name == "train" and recipe.trains_on_onednn)):
            compiled[name] = _compile(traced[name])
        result["compile_seconds"][name] = round(time.perf_counter() - began, 1)
        if isinstance(compiled[name], str):
            return result | {
                "fits": False,
                "program": name,
                "compiler": compiled[name],
                "advice": _advice(result, programs),
            }
    memory, code = result["memory"], compiled["train"].memory_analysis()
    memory["temporaries"] = code.temp_size_in_bytes
    memory["program"] = code.generated_code_size_in_bytes
    memory["peak"] = (code.argument_size_in_bytes + code.output_size_in_bytes - code.alias_size_in_bytes
                      + code.temp_size_in_bytes + code.generated_code_size_in_bytes)  # fmt: skip
    result["fits"] = memory["peak"] <= memory["capacity"]
    if not result["fits"]:
        result["advice"] = _advice(result, programs)

    step, augment = counts.count_program(compiled["train"]), counts.count_program(compiled["augment"])
    peak = estimate.peak(chip, config.precision, config.matmul_precision)
    bound = estimate.bound(chip, n, peak, flops, step.bytes, step.collectives)
    seconds = bound.seconds * recipe.total
    return result | {
        "bytes": step.bytes,
        "augment_bytes": augment.bytes,
        "collectives": {kind: {"count": c, "bytes": b} for kind, (c, b) in step.collectives.items()},
        "seconds": {"compute": bound.compute, "memory": bound.memory, "network": bound.network, "step": bound.seconds},
        "bound_by": bound.by,
        "images_per_second": config.batch_size * recipe.num_seeds / bound.seconds,
        "run_seconds": seconds,
        "chip_hours": seconds * n / 3600,
    }


def _matmul_flops_per_chip(programs: Programs) -> float:
    """Counts a chip's matmul FLOPs in a step: its share of the batch's, and the optimizer's, such as Muon's.

    Every chip updates all parameters, but for those that `fsdp` shards. An optimizer that evaluates the
    model, as L-BFGS does, evaluates it on the batch.
    """
    by_scope, mesh = jaxprs.matmul_flops_by_scope(_for_tpu(programs).traced_train.jaxpr), programs.mesh
    model = type(programs.recipe.model).__name__
    update = sum(flops for scope, flops in by_scope.items() if OPTIMIZER in scope and model not in scope)
    repeats = mesh.size / mesh.shape.get("fsdp", 1)
    return (sum(by_scope.values()) + update * (repeats - 1)) / mesh.size


def _for_tpu(programs: Programs) -> Programs:
    """Returns the programs as traced for TPU, with matmuls and convolutions as plain primitives."""
    device = AbstractDevice("", num_cores=None, platform="tpu")
    sizes, names = programs.mesh.axis_sizes, programs.mesh.axis_names
    mesh = AbstractMesh(sizes, names, (AxisType.Auto,) * len(names), abstract_device=device)
    return Programs(programs.recipe, cast(Mesh, mesh))


def _traced_augment(programs: Programs) -> jax.stages.Traced:
    """Traces a program of only the training device ops and mixing, for the batch of a step."""
    recipe, split = programs.recipe, sharding.sharded(programs.mesh)
    augment, shape = recipe.augment(train=True), (programs.stream.rows, *recipe.data.image_shape)

    def program(seed: jax.Array, images: jax.Array, ids: jax.Array) -> PyTree:
        images = augment(rng.key(seed, "augment"), images, *((seed, ids, ids) if recipe.needs_ids else ()))
        return images if recipe.mix is None else recipe.mix(rng.key(seed, "mix"), images)[0]

    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding.replicated(programs.mesh))
    images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=split)
    ids = jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=split)
    with programs.tracing():
        return jax.jit(program, out_shardings=split).trace(seed, images, ids)


def _compile(traced: jax.stages.Traced) -> jax.stages.Compiled | str:
    """Compiles a program; returns the compiler's message if it does not fit into the chip's memory."""
    try:
        return traced.lower().compile()
    except Exception as e:
        if not _FULL.search(str(e)):
            raise
        lines = [line.strip() for line in str(e).splitlines() if re.search(r"\d[KMGT]", line)]
        return (lines or str(e).splitlines())[0][:300]


def _advice(result: JsonObject, programs: Programs) -> list[str]:
    """Suggests changes that would make the run fit, assuming temporaries proportional to the number of images."""
    memory, accumulate, batch_size = result["memory"], result["accumulate"], result["batch_size"]
    chips, backbone = programs.mesh.size, programs.recipe.backbone
    state = memory["parameters"] + memory["optimizer"] + memory["averages"]
    free = memory["capacity"] - state - memory["batch"]
    now = programs.mesh.shape.get("fsdp", 1)
    # The smallest FSDP axis beyond the current one that leaves half of each chip to temporaries, else all chips.
    axes = [k for k in range(now + 1, chips + 1)
            if chips % k == 0 and (k == chips or state * now / k <= memory["capacity"] / 2)]  # fmt: skip
    fsdp = f"mesh='data=-1, fsdp={axes[0]}'" if axes else ""
    if state >= memory["capacity"]:
        less = ["a smaller model", "or an optimizer with less state, such as adamw(mu_dtype='bfloat16')"]
        return [f"parameters, optimizer and averages alone take {format_bytes(state)} of each chip: "
                + ", ".join([f"{fsdp} (sharded)", *less] if fsdp else less)]  # fmt: skip
    per_chip = batch_size // chips
    if "temporaries" in memory:
        factors = [k for k in range(2, per_chip + 1)
                   if per_chip % (k * accumulate) == 0 and memory["temporaries"] / k <= free]  # fmt: skip
    else:  # the compiler failed without a number
        factors = [k for k in (2, 4, 8, 16) if per_chip % (k * accumulate) == 0]
    advice = []
    if factors:
        advice.append(f"accumulate={factors[0] * accumulate}: gradient accumulation over microbatches")
        advice.append(f"batch_size={batch_size // factors[0]}, or {factors[0]} times the chips")
    if getattr(backbone, "remat", None) == "":
        advice.append("the model with remat='block': recomputes each block's activations in the backward pass")
    if state > memory["capacity"] / 10 and fsdp:
        advice.append(f"{fsdp}: shards parameters, optimizer state and averages")
    if result["precision"] == "float32":
        advice.append("precision='bfloat16': about half the temporaries")
    return advice or ["a smaller batch or image, or more chips"]


def _print(result: JsonObject) -> None:
    memory = result["memory"]
    print(f"{result['model']} on {result['chips']}, {result['batch_size']} images per step in {result['precision']}")
    rows = [(name, format_bytes(memory[name])) for name in (*_PARTS, "temporaries", "program") if name in memory]
    if "peak" in memory:
        rows.append(("peak memory", f"{format_bytes(memory['peak'])} of {format_bytes(memory['capacity'])}"))
    error = [result["compiler"]] if "compiler" in result else []
    rows.append(("fits", "yes" if result["fits"] else f"no; {'; or '.join([*error, *result['advice']])}"))
    if "seconds" in result:
        rows += _rates(result)
    compiled = ", ".join(f"{name} {seconds} s" for name, seconds in result["compile_seconds"].items())
    rows += [("compile time", compiled), ("chip data", result["source"])]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        terminal.print_text(f"  {name:<{width}}  {text}")


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 3600:.3g} h"


def _rates(result: JsonObject) -> list[tuple[str, str]]:
    seconds, augment = result["seconds"], result["augment_bytes"]
    each = ", ".join(f"{name} {seconds[name] * 1e3:.3g} ms" for name in ("compute", "memory", "network"))
    return [
        ("matmul FLOPs", f"{result['flops']:.3g} per step and chip"),
        ("memory traffic", f"{format_bytes(result['bytes'])} per step and chip"),
        ("augmentation", f"{format_bytes(augment)} of memory traffic, {augment / result['bytes']:.1%} of the step's"),
        *((kind, f"{of['count']} per step, {format_bytes(of['bytes'])}") for kind, of in result["collectives"].items()),
        ("step", f"at least {seconds['step'] * 1e3:.3g} ms, bound by {result['bound_by']}: {each}"),
        ("images per second", f"at most {result['images_per_second']:,.0f}"),
        ("whole run", f"at least {_duration(result['run_seconds'])} for {result['steps']:,} steps, "
                      f"{result['chip_hours']:.3g} chip-hours, without evaluation"),
    ]  # fmt: skip
