"""Lower bounds on the time of ImageNet recipes on 1, 8, 64 and 256 chips, by `launch.py dryrun`: a table and a plot.

    uv run --isolated --extra tpu --group peers benchmarks/scaling.py
    uv run --isolated --extra cuda-compiler --group peers benchmarks/scaling.py --kind=a100

No chip is needed: XLA's compiler for them says what a step reads, writes and exchanges, and their published figures say
how long that takes at least. Writes the dry runs' JSON, scaling-KIND.md and scaling-KIND.png. What was compiled before
is taken from its JSON; remove that to compile anew.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CHIPS = {
    "v5e": ("v5e:1x1", "v5e:2x4", "v5e:8x8", "v5e:16x16"),
    "h100": ("h100:1", "h100:8", "h100:8x8", "h100:32x8"),
    "a100": ("a100:1", "a100:8", "a100:8x8", "a100:32x8"),
}
VIT = "vit('{}', patch=16, positions='sincos', pool='mean', representation=True, head_init='zeros')"
# Config, keys, and the batch size by number of chips. Goyal et al. use 32 images per GPU; Beyer et al. one batch size.
RECIPES: dict[str, tuple[str, dict[str, str], dict[int, int]]] = {
    "ResNet-50": ("imagenet_resnet50", {}, {1: 256, 8: 256, 64: 2048, 256: 8192}),
    "ViT-S/16": ("imagenet_vit_s16", {}, dict.fromkeys((1, 8, 64, 256), 1024)),
    "ViT-B/16": ("imagenet_vit_s16", {"model": VIT.format("B")}, dict.fromkeys((1, 8, 64, 256), 1024)),
}
EXAMPLES = {"imagenet_resnet50": 1_281_167, "imagenet_vit_s16": 1_268_355}  # the latter holds out 1 %


def dry_run(recipe: str, chips: str, count: int, out: Path, keys: dict[str, str]) -> dict[str, Any]:
    """The JSON of the dry run, with gradient accumulation if the batch does not fit otherwise."""
    config, own, batches = RECIPES[recipe]
    folder = out / "-".join([recipe.replace("/", "-"), *(f"{k}={v}" for k, v in keys.items())])
    file = folder / f"dryrun-{chips.replace(':', '-')}.json"
    if not file.is_file():
        settings = {"batch_size": str(batches[count]), **own, **keys}
        command = [sys.executable, str(ROOT / "launch.py"), "dryrun", f"--config={ROOT}/configs/{config}.py",
                   f"--chips={chips}", f"--workdir={folder}", f"--examples={EXAMPLES[config]}",
                   *(f"--config.{key}={value}" for key, value in settings.items())]  # fmt: skip
        print(recipe, chips, keys, file=sys.stderr)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, 1) or not file.is_file():
            raise SystemExit(f"the dry run of {recipe} on {chips} failed")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["fits"]:
        return found
    parts = next((a.split(":")[0].partition("=")[2] for a in found["advice"] if a.startswith("accumulate=")), "")
    more = {"accumulate": parts} if parts else keys
    return found if more == keys else dry_run(recipe, chips, count, out, more)


def table(rows: list[tuple[str, int, dict[str, Any]]]) -> str:
    """Formats the rows as a Markdown table."""
    heads = ("", "chips", "batch", "memory of a chip", "compute, memory, network, ms", "bound by", "images/s",
             "the run", "chip-hours")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for recipe, count, found in rows:
        batch = f"{found['batch_size']}" + (f" in {found['accumulate']} parts" if found["accumulate"] > 1 else "")
        if "seconds" not in found:
            lines.append(f"| {recipe} | {count} | {batch} | does not fit | | | | | |")
            continue
        peak, seconds = found["memory"]["peak"] / 1e9, found["seconds"]
        times = ", ".join(f"{seconds[k] * 1e3:.3g}" for k in ("compute", "memory", "network"))
        lines.append(
            f"| {recipe} | {count} | {batch} | {peak:.2f} GB | {times} | {found['bound_by']} | "
            f"{found['images_per_second']:,.0f} | {found['run_seconds'] / 3600:.3g} h | {found['chip_hours']:.3g} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[tuple[str, int, dict[str, Any]]], file: Path, kind: str) -> None:
    """Plots images per second against chips, with linear scaling from the first point."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for recipe in RECIPES:
        points = [(n, found["images_per_second"]) for name, n, found in rows if name == recipe and "seconds" in found]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        [line] = axes.loglog(x, y, marker="o", label=recipe)
        axes.loglog(x, [y[0] * n / x[0] for n in x], color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel=f"{kind} chips", ylabel="images a second, at most",
             title="Bounds by the chip's published figures; dotted: in proportion")  # fmt: skip
    axes.set_xticks([1, 8, 64, 256], ["1", "8", "64", "256"])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="v5e", choices=CHIPS)
    parser.add_argument("--recipes", default=",".join(RECIPES), help="comma-separated")
    parser.add_argument("--counts", default="1,8,64,256", help="comma-separated numbers of chips, of 1, 8, 64 and 256")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    counts = [int(n) for n in args.counts.split(",")]
    rows = [
        (recipe, count, dry_run(recipe, CHIPS[args.kind][i], count, args.out, {}))
        for recipe in args.recipes.split(",")
        for i, count in enumerate((1, 8, 64, 256))
        if count in counts
    ]
    text = table(rows)
    print(text)
    (args.out / f"scaling-{args.kind}.md").write_text(text, encoding="utf-8")
    plot(rows, args.out / f"scaling-{args.kind}.png", args.kind)


if __name__ == "__main__":
    main()
