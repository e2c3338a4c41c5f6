"""What training prints for people: a head that says what is trained, a line per record, and what to run next.

Files for programs are written by `run.writers`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from imgclf_jax.config import KEYS
from imgclf_jax.core import jaxprs, processes
from imgclf_jax.core.terminal import format_metrics
from imgclf_jax.core.text import printable
from imgclf_jax.data import stream
from imgclf_jax.optim import rules
from imgclf_jax.programs import Programs
from imgclf_jax.run.provenance import processor
from imgclf_jax.run.workdir import Workdir

_NOT_IN_A_LINE = {"examples", "grad_norm", "param_norm", "learning_rate", "input_wait"}  # metrics.jsonl has them


def head(
    compiling: Programs, images: stream.Images, evals: Mapping[str, stream.Images], workdir: Workdir, fresh: bool
) -> str:
    """What is trained, on what and how. A run that begins (`fresh`) also has its model's parameters."""
    recipe, config = compiling.recipe, compiling.recipe.config
    shape, classes = "x".join(map(str, images.shape)), len(recipe.data.class_names)
    options = [f"{key}={config[key]}" for key in ("clip", "accumulate", "ema", "method", "gradient", "stop")
               if config[key] != KEYS[key][0]]  # fmt: skip
    seeds = f" to {config.seed + config.num_seeds - 1}, trained at once" if config.num_seeds > 1 else ""
    epochs = recipe.total * config.batch_size / len(images)
    evaluating = ", ".join(f"{name} = {config.data.eval[name]} ({len(one)})" for name, one in evals.items())
    model, device = printable(config.model), compiling.mesh.devices.flat[0]
    if fresh:
        counts = rules.parameters_by_module(recipe.parameters)
        flops = jaxprs.matmul_flops(jaxprs.forward(recipe.model, recipe.data.image_shape)) / 1e6
        model += f"\n{sum(counts.values()):,} parameters, {flops:,.3g} MFLOPs an image"
        model += "".join(f"\n  {name:<16}{count:>12,}" for name, count in counts.items())
    devices = f"{compiling.mesh.size} {device.platform} device{'s' * (compiling.mesh.size > 1)}"
    devices += f" of {processes.count()} processes" * (processes.count() > 1)
    kind = processor() if device.platform == "cpu" else device.device_kind
    facts = {
        "data": f"{printable(config.data.source)}: {len(images):,} images of {shape}, {classes} classes\n"
                f"training on {config.data.train} ({len(images)})" + (f"\nevaluating on {evaluating}" * bool(evals)),
        "model": model,
        "optimizer": ", ".join([config.optimizer, *options]),
        "schedule": config.schedule,
        "steps": f"{recipe.total:,} of {config.batch_size} images, {epochs:.4g} epochs",
        "devices": f"{devices}, {config.precision}\n{kind}",
        "seed": f"{config.seed}{seeds}",
        "workdir": printable(str(workdir.path)),
    }  # fmt: skip
    return "\n".join(f"  {name:<11}" + text.replace("\n", "\n" + " " * 13) for name, text in facts.items())


def line(step: int, steps_per_epoch: float, name: str, values: Mapping[str, float]) -> str:
    """A record of training or of an evaluation set: `step 225  epoch 10.0  test  accuracy 0.9694 …`."""
    shown = {key: value for key, value in values.items() if key not in _NOT_IN_A_LINE}
    if shown.get("nll") == shown.get("loss"):  # said once
        shown.pop("nll", None)
    if "images_per_second" in shown:
        shown["images/s"] = round(shown.pop("images_per_second"))
    return f"step {step}  epoch {step / steps_per_epoch:.1f}  {name}  {format_metrics(shown)}"


def program() -> str:
    """How this program was called, for commands to run next."""
    name = Path(sys.argv[0]).name
    return {"launch.py": "uv run launch.py", "__main__.py": "python -m imgclf_jax"}.get(name, name)
