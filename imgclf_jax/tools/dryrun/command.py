"""`dryrun`: compiles a run's programs for chips that need not be here, without data, and says what they would take."""

import json
import logging
import re
import time
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from imgclf_jax import losses
from imgclf_jax.core import rng, sharding
from imgclf_jax.core.memory import size
from imgclf_jax.programs import Programs
from imgclf_jax.recipe import Recipe, check_names
from imgclf_jax.run import terminal
from imgclf_jax.run.provenance import write_json
from imgclf_jax.run.workdir import Workdir
from imgclf_jax.tools.dryrun import counts, described, estimate, topology
from imgclf_jax.trained import load_teacher

log = logging.getLogger(__name__)

_PARTS = ("parameters", "optimizer", "averages", "batch")
_FULL = re.compile(r"RESOURCE_EXHAUSTED|CompileTimeHbmOom|out of memory", re.IGNORECASE)


def main(config: ConfigDict, workdir: Workdir, chips: str, shape: str, format: str, **facts: int | None) -> int:
    """Prints the report in this `format` and writes it to the work directory. Returns 1 if the run does not fit.

    `shape` and `facts` describe the data where they are absent: see `described.Given`. `topology.prepare_from_flags`
    must run before JAX is imported.
    """
    return run(config, topology.parse(chips), {"shape": topology.parse_shape(shape), **facts}, format, workdir.path)


def run(config: ConfigDict, chips: topology.Chips, given: dict[str, Any], form: str, folder: Path) -> int:
    """`main` with its flags parsed."""
    terminal.setup_logging()
    mesh = sharding.make_mesh(topology.devices(chips), config.mesh)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulate)
    check_names(config)
    data = described.describe(config, described.Given(**given), losses.needs_class_counts(config.loss))
    found = report(Programs(Recipe(config, data, load_teacher), mesh), chips)
    path = folder / f"dryrun-{str(chips).replace(':', '-')}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    if form == "json":
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    log.info("written to %s", path)
    return 0 if found["fits"] else 1


def report(programs: Programs, chips: topology.Chips) -> dict[str, Any]:
    """What the run takes of each chip and how long, as JSON values: bytes, seconds, operations."""
    recipe, chip = programs.recipe, estimate.chip_of(chips)
    config, n = recipe.config, chips.count
    state, window = programs.shape["state"], programs.shape["sums"]
    held = {
        "parameters": counts.bytes_a_device((state.params, state.model_state)),
        "optimizer": counts.bytes_a_device(state.opt_state),
        "averages": counts.bytes_a_device((state.ema, window)),
        "batch": counts.bytes_a_device(programs.chunk_shape(programs.steps_per_call)),
    }
    flops = counts.product_flops(_for_tpu(programs).train_step.jaxpr) / n
    result: dict[str, Any] = {
        "chips": str(chips), "source": chip.source, "model": config.model, "batch_size": config.batch_size,
        "accumulate": config.accumulate, "precision": config.precision, "steps": recipe.total,
        "memory": {"capacity": int(chip.memory), **held}, "flops": flops, "compile_seconds": {},
    }  # fmt: skip
    compiled = {}
    for name, traced in (("init", programs.traced_init), ("train", programs.traced_train),
                         ("eval", programs.traced_eval), ("augment", _traced_augment(programs))):  # fmt: skip
        began = time.perf_counter()
        compiled[name] = _compile(traced)
        result["compile_seconds"][name] = round(time.perf_counter() - began, 1)
        log.info("%s compiled in %.1f s", name, result["compile_seconds"][name])
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

    of_step, of_augment = counts.count_program(compiled["train"]), counts.count_program(compiled["augment"])
    peak = estimate.peak(chip, config.precision, config.matmul_precision)
    bound = estimate.bound(chip, n, peak, flops, of_step.bytes, of_step.collectives)
    seconds = bound.seconds * recipe.total
    return result | {
        "bytes": of_step.bytes,
        "augment_bytes": of_augment.bytes,
        "collectives": {kind: {"count": c, "bytes": b} for kind, (c, b) in of_step.collectives.items()},
        "seconds": {"compute": bound.compute, "memory": bound.memory, "network": bound.network, "step": bound.seconds},
        "bound_by": bound.by,
        "images_per_second": config.batch_size * recipe.num_seeds / bound.seconds,
        "run_seconds": seconds,
        "chip_hours": seconds * n / 3600,
    }


def _for_tpu(programs: Programs) -> Programs:
    """The same programs in the form whose products are plain ones."""
    device = AbstractDevice("", num_cores=None, platform="tpu")
    sizes, names = programs.mesh.axis_sizes, programs.mesh.axis_names
    mesh = AbstractMesh(sizes, names, (AxisType.Auto,) * len(names), abstract_device=device)
    return Programs(programs.recipe, cast(Mesh, mesh))


def _traced_augment(programs: Programs) -> Any:
    """The device ops of training and the mixing, on the batch of a step, as a program of their own."""
    recipe, split = programs.recipe, sharding.sharded(programs.mesh)
    augment, shape = recipe.augment(train=True), (programs.stream.rows, *recipe.data.image_shape)

    def program(seed: jax.Array, images: jax.Array, ids: jax.Array) -> Any:
        images = augment(rng.key(seed, "augment"), images, *((seed, ids, ids) if recipe.with_ids else ()))
        return images if recipe.mix is None else recipe.mix(rng.key(seed, "mix"), images)[0]

    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding.replicated(programs.mesh))
    images = jax.ShapeDtypeStruct(shape, np.uint8, sharding=split)
    ids = jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=split)
    with programs.tracing():
        return jax.jit(program, out_shardings=split).trace(seed, images, ids)


def _compile(traced: Any) -> Any:
    """The compiled program, or what the compiler says if it does not fit into the chip's memory."""
    try:
        return traced.lower().compile()
    except Exception as e:
        if not _FULL.search(str(e)):
            raise
        lines = [line.strip() for line in str(e).splitlines() if re.search(r"\d[KMGT]", line)]
        return (lines or str(e).splitlines())[0][:300]


def _advice(result: dict[str, Any], programs: Programs) -> list[str]:
    """What would make it fit, in words. Estimated: temporaries are taken to shrink in proportion to the images."""
    memory, accumulate, batch_size = result["memory"], result["accumulate"], result["batch_size"]
    chips, backbone = programs.mesh.size, programs.recipe.backbone
    state = memory["parameters"] + memory["optimizer"] + memory["averages"]
    free = memory["capacity"] - state - memory["batch"]
    now = programs.mesh.shape.get("fsdp", 1)
    # As few parts as leave half of a chip to the temporaries, more than now; one a chip where that is not enough.
    parts = [k for k in range(now + 1, chips + 1)
             if chips % k == 0 and (k == chips or state * now / k <= memory["capacity"] / 2)]  # fmt: skip
    split = f"mesh='data=-1, fsdp={parts[0]}'" if parts else ""
    if state >= memory["capacity"]:
        less = ["a smaller model", "or an optimizer with less state, such as adamw(mu_dtype='bfloat16')"]
        return [f"parameters, optimizer and averages alone take {size(state)} of each chip: "
                + ", ".join([f"{split} (in parts)", *less] if split else less)]  # fmt: skip
    a_device = batch_size // chips
    if "temporaries" in memory:
        parts = [k for k in range(2, a_device + 1)
                 if a_device % (k * accumulate) == 0 and memory["temporaries"] / k <= free]  # fmt: skip
    else:  # the compiler stopped: nobody knows by how much
        parts = [k for k in (2, 4, 8, 16) if a_device % (k * accumulate) == 0]
    advice = []
    if parts:
        advice.append(f"accumulate={parts[0] * accumulate}: the same batch, in parts")
        advice.append(f"batch_size={batch_size // parts[0]}, or {parts[0]} times the chips")
    if getattr(backbone, "remat", None) == "":
        advice.append("the model with remat='block': the inside of each block is computed again, and not kept")
    if state > memory["capacity"] / 10 and split:
        advice.append(f"{split}: parameters, optimizer and averages in parts")
    if result["precision"] == "float32":
        advice.append("precision='bfloat16': about half of the temporaries")
    return advice or ["a smaller batch or image, or more chips"]


def _print(found: dict[str, Any]) -> None:
    memory = found["memory"]
    print(f"{found['model']} on {found['chips']}, {found['batch_size']} images a step in {found['precision']}")
    rows = [(name, size(memory[name])) for name in (*_PARTS, "temporaries", "program") if name in memory]
    if "peak" in memory:
        rows.append(("at most at once", f"{size(memory['peak'])} of {size(memory['capacity'])}"))
    why = [found["compiler"]] if "compiler" in found else []
    rows.append(("fits", "yes" if found["fits"] else f"no; {'; or '.join([*why, *found['advice']])}"))
    if "seconds" in found:
        rows += _rates(found)
    rows.append(("compiled in", ", ".join(f"{name} {seconds} s" for name, seconds in found["compile_seconds"].items())))
    rows.append(("the chip's figures", found["source"]))
    for name, text in rows:
        print(f"  {name:<16}  {text}")


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 600 else f"{seconds / 3600:.3g} h"


def _rates(found: dict[str, Any]) -> list[tuple[str, str]]:
    seconds, of_augment = found["seconds"], found["augment_bytes"]
    each = ", ".join(f"{name} {seconds[name] * 1e3:.3g} ms" for name in ("compute", "memory", "network"))
    return [
        ("operations", f"{found['flops']:.3g} of products, a step and chip"),
        ("traffic", f"{size(found['bytes'])} of memory, a step and chip"),
        ("augmentation", f"{size(of_augment)} of memory by itself, {of_augment / found['bytes']:.1%} of the step's"),
        *((kind, f"{of['count']} a step, of {size(of['bytes'])}") for kind, of in found["collectives"].items()),
        ("a step", f"at least {seconds['step'] * 1e3:.3g} ms, bound by {found['bound_by']}: {each}"),
        ("images a second", f"at most {found['images_per_second']:,.0f}"),
        ("the whole run", f"at least {_duration(found['run_seconds'])} for {found['steps']:,} steps, "
                          f"{found['chip_hours']:.3g} chip-hours, without evaluation"),
    ]  # fmt: skip
