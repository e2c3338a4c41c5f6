"""All evidence that needs an accelerator, in one go: bits, numerics and speed, on a machine with a GPU or a TPU.

    python benchmarks/accelerator.py                                  # everything, within ten minutes on an H100
    python benchmarks/accelerator.py --fashion=fashion.npz --cifar10=cifar10.npz
    python benchmarks/accelerator.py --small --only bits forms        # a rehearsal, on CPU too

Needs jax, flax, optax, orbax-checkpoint, ml_collections, scikit-learn, Pillow, etils and rich: neither TensorFlow nor a
network. PyTorch, torchvision and timm are measured beside it where they are installed. An .npz file holds x_train,
y_train, x_test and y_test; without one, made-up images of the same shape stand in, and no accuracy is reported.

    bits        the digest of a run: trained again, resumed after SIGKILL, with the data on the host and on the device,
                and without deterministic kernels, with what these cost
    forms       each backbone's loss and gradient on the accelerator beside those on CPU, in float32
    airbench    airbench94 over seeds: accuracy and seconds
    throughput  ResNet-50 and ViT-S/16 at 224 px in bfloat16: training images a second, `dryrun`'s estimate, timm

Writes accelerator.json and prints it as a table in Markdown.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

_SHAPES = {"fashion": (28, 28, 1), "cifar10": (32, 32, 3)}
_BACKBONES = ("cnn", "mlp", "resnet_cifar(8)", "resnet(depth=18)", "vit('Ti', patch=8)",
              "mixer('S', patch=8)", "convnext('T')", "airbench",
              "rnn")  # fmt: skip
_BITS = {
    "digits": {"config": "digits.py", "total": ("20 epochs", "40 steps")},
    "fashion": {"config": "fashion_mnist.py", "total": ("1 epochs", "40 steps")},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="a few steps of everything: does it work here?")
    parser.add_argument("--fashion", type=Path, help="Fashion-MNIST as an .npz")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10 as an .npz")
    parser.add_argument("--seeds", type=int, default=3, help="of airbench94")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        args.device = _device()
        found: dict[str, Any] = {"device": args.device, "small": args.small}
        for part in args.only:
            began = time.perf_counter()
            found[part] = list(PARTS[part](args))
            print(f"# {part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    return 1 if any(row.get("ok") is False for part in args.only for row in found[part]) else 0


def bits(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way of training the same run: its digest, whether that is the first one's, and the seconds."""
    for name, run in list(_BITS.items())[: 1 if args.small else None]:
        flags = [f"--config={ROOT / 'configs' / run['config']}", f"--config.total={run['total'][args.small]}",
                 "--config.eval_every=", "--config.checkpoint_every=20 steps", "--config.tensorboard=False",
                 *(_source("fashion", args) if name == "fashion" else [])]  # fmt: skip
        ways = {"first": [], "again": [], "data on the device": ["--config.data.placement=device"],
                "not deterministic": ["--config.deterministic=False"]}  # fmt: skip
        first = ""
        for way, more in ways.items():
            digest, seconds = _train(args.folder / f"{name} {way}", [*flags, *more])
            first = first or digest
            same = digest == first
            yield {"run": name, "way": way, "digest": digest[:8], "same": same, "seconds": seconds,
                   **({} if way == "not deterministic" else {"ok": same})}  # fmt: skip
        digest = _kill_and_resume(args.folder / f"{name} killed", flags)
        yield {"run": name, "way": "resumed after SIGKILL", "digest": digest[:8], "same": digest == first,
               "ok": digest == first}  # fmt: skip


def _train(workdir: Path, flags: list[str]) -> tuple[str, float]:
    """(params_sha256, seconds of training as the run reports them)."""
    done = subprocess.run(_command(workdir, flags), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"training fails: {done.stderr[-2000:]}")
    result = json.loads((workdir / "result.json").read_text())
    return result["params_sha256"], round(result["seconds"], 2)


def _kill_and_resume(workdir: Path, flags: list[str]) -> str:
    """Kills the run once it has saved a checkpoint, and lets the same command finish it."""
    with subprocess.Popen(_command(workdir, flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any((workdir / "checkpoints").glob("[0-9]*")):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    return _train(workdir, flags)[0]


def _command(workdir: Path, flags: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), "train", f"--workdir={workdir}", *flags]


def _source(name: str, args: argparse.Namespace) -> list[str]:
    """The flags that name a data set: its file, or made-up images of its shape."""
    file = getattr(args, name)
    count = 512 if args.small else 50000
    source = f"arrays({str(file)!r})" if file else f"fake({count}, {_SHAPES[name]}, 10)"
    return [f"--config.data.source={source}"]


def forms(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each backbone: the largest difference of loss and gradient between the accelerator and CPU.

    Differences of the gradient are relative to its largest value. In float32 with matmuls of full precision they are
    roundings: below 1e-3 through tens of layers.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from imgclf_jax.core import platform
    from imgclf_jax.models import classifier

    images = np.random.default_rng(0).random((8, 32, 32, 3), np.float32)
    labels = np.arange(8) % 5
    for text in _BACKBONES[: 2 if args.small else None]:
        model = classifier.build(text, 5, "float32")
        with jax.default_device(jax.devices("cpu")[0]):
            variables = model.init(jax.random.key(0), images, train=False)

        def loss(params: Any, rest: Any, model: Any = model) -> jax.Array:
            logits = model.apply({"params": params, **rest}, images, train=False)
            own = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)
            return -jnp.mean(own)

        results = []
        for device in (jax.devices("cpu")[0], jax.devices()[0]):
            given = jax.device_put(dict(variables), device)
            params = given.pop("params")
            kind = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
            with platform.tracing_for(kind), jax.default_matmul_precision("float32"):
                value, gradient = jax.jit(jax.value_and_grad(loss))(params, given)
            results.append((float(value), jax.tree.map(np.asarray, gradient)))
        (cpu, cpu_gradient), (here, gradient) = results
        scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(cpu_gradient))
        difference = max(float(np.abs(a - b).max()) / scale for a, b in
                         zip(jax.tree.leaves(cpu_gradient), jax.tree.leaves(gradient), strict=True))  # fmt: skip
        yield {"model": text, "loss": here, "loss difference": abs(here - cpu), "gradient difference": difference,
               "ok": abs(here - cpu) < 1e-4 * abs(cpu) and difference < 1e-3}  # fmt: skip


def airbench(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each seed of airbench94: test accuracy, and seconds of training without compilation."""
    flags = [f"--config={ROOT / 'configs' / 'cifar10_airbench.py'}", *_source("cifar10", args)]
    if args.small:
        flags += ["--config.total=4 steps", "--config.batch_size=64", "--config.schedule=constant(0.1)",
                  "--config.data.eval.test=test[:64]"]  # fmt: skip
    for seed in range(1 if args.small else args.seeds):
        workdir = args.folder / f"airbench {seed}"
        _, seconds = _train(workdir, [*flags, f"--config.seed={seed}"])
        result = json.loads((workdir / "result.json").read_text())
        accuracy = {"accuracy": round(result["test"]["accuracy"], 4)} if args.cifar10 else {}
        yield {"seed": seed, "seconds": seconds, "images a second": round(result["images_per_second"]), **accuracy}


def throughput(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each network: training images a second, beside PyTorch and the estimate of `dryrun`."""
    models = {
        "resnet50": ("imagenet_resnet50.py", "resnet50"),
        "vit_s16": ("imagenet_vit_s16.py", "vit_small_patch16_224"),
    }
    size, batch, steps = (32, 8, 4) if args.small else (224, 256, 60)
    for name, (config, torch_name) in list(models.items())[args.small :]:
        source = f"fake({batch * 8}, ({size}, {size}, 3), 1000)"
        flags = [f"--config={ROOT / 'configs' / config}", f"--config.data.source={source}",
                 "--config.data.eval.test=test[:8]", f"--config.batch_size={batch}", f"--config.total={steps} steps",
                 "--config.preprocess=decode(3)", "--config.preprocess_eval=", "--config.data.placement=device",
                 "--config.batch_norm=global", "--config.augment=flip_lr|normalize", "--config.mix=",
                 "--config.schedule=constant(1e-3)", "--config.precision=bfloat16", "--config.log_every=20 steps",
                 "--config.eval_every=", "--config.checkpoint_every=", "--config.checkpoint.best=",
                 "--config.tensorboard=False"]  # fmt: skip
        if args.small:
            flags.append("--config.model=vit('Ti', patch=16)")
        workdir = args.folder / name
        _train(workdir, flags)
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        speeds = [record["train/images_per_second"] for record in records if "train/images_per_second" in record]
        own = max(speeds) if speeds else json.loads((workdir / "result.json").read_text())["images_per_second"]
        row: dict[str, Any] = {"network": name, "images a second": round(own)}
        if bound := _bound(args.device["kind"], flags):
            row |= {"dryrun's estimate": round(bound), "share of the estimate": round(own / bound, 2)}
        if torch_speed := _torch_speed(torch_name, size, batch, args.small):
            row |= {"PyTorch AMP": round(torch_speed), "ratio": round(own / torch_speed, 2)}
        yield row
        shutil.rmtree(workdir)


def _bound(kind: str, flags: list[str]) -> float | None:
    """The images a second that `dryrun` estimates for the chip; None without its figures or its compiler."""
    kind = kind.lower().replace(" lite", "e")  # "TPU v5 lite" is a v5e
    chip = next((chip for chip in ("h100", "a100", "v5e", "v5p", "v6e") if chip in kind), None)
    if chip is None:
        return None
    shape = {"v5e": "1x1", "v6e": "1x1", "v5p": "1x1x1"}.get(chip, "1")
    command = [sys.executable, str(ROOT / "launch.py"), "dryrun", f"--chips={chip}:{shape}", "--format=json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return float(json.loads(done.stdout)["images_per_second"])


def _torch_speed(name: str, size: int, batch: int, small: bool) -> float | None:
    """Training images a second of timm's model in PyTorch: compiled, channels-last, bfloat16 autocast, fused SGD."""
    if small or not (importlib.util.find_spec("torch") and importlib.util.find_spec("timm")):
        return None
    program = f"""
import time, timm, torch
if not torch.cuda.is_available():
    raise SystemExit("no GPU for PyTorch")
model = timm.create_model({name!r}).cuda().to(memory_format=torch.channels_last)
compiled, optimizer = torch.compile(model), torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)
images = torch.rand({batch}, 3, {size}, {size}, device="cuda").to(memory_format=torch.channels_last)
labels = torch.randint(1000, ({batch},), device="cuda")
def step():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        logits = compiled(images)
    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
    optimizer.step()
for _ in range(10):
    step()
torch.cuda.synchronize()
began = time.perf_counter()
for _ in range(30):
    step()
torch.cuda.synchronize()
print({batch} * 30 / (time.perf_counter() - began))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def _device() -> dict[str, Any]:
    """The devices that JAX finds, asked in a process of its own, since two processes cannot share a TPU."""
    program = (
        "import jax, json; d = jax.devices(); "
        "print(json.dumps([d[0].platform, d[0].device_kind, len(d), jax.__version__]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    platform, kind, count, version = json.loads(done.stdout.splitlines()[-1])
    return {"platform": platform, "kind": kind, "count": count, "jax": version}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown, a table for each part."""
    device = found["device"]
    lines = [f"{device['count']} x {device['kind']}, jax {device['jax']}" + (", small sizes" if found["small"] else "")]
    for part in PARTS:
        rows = found.get(part, [])
        if not rows:
            continue
        names = list(dict.fromkeys(name for row in rows for name in row if name != "ok"))
        lines += ["", f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
        lines += [f"| {' | '.join(_text(row.get(name, '')) for name in names)} |" for row in rows]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "bits": bits, "airbench": airbench, "throughput": throughput,
    "forms": forms,  # last: it opens the accelerator in this process
}  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main())
