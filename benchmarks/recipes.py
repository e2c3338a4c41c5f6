"""A table of every recipe in configs/, compiled ahead of time for absent chips by `launch.py dryrun`.

    uv run --isolated --extra tpu benchmarks/recipes.py --chips=v5e:2x4
    uv run --isolated --extra cuda-compiler benchmarks/recipes.py --chips=h100:8

Needs no data: DATA holds the sizes of the data sets. Writes the dry runs' JSON and recipes-CHIPS.md. Existing JSON is
reused; remove it to compile again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Shape after preprocessing, classes, training examples. For `folder`, ten classes of 1,000 photos each are assumed.
DATA = {
    "cifar10_airbench": ("32,32,3", 10, 50_000),
    "cifar10_resnet20": ("32,32,3", 10, 50_000),
    "digits": ("28,28,1", 10, 1_437),
    "faces": ("48,40,1", 40, 200),
    "fashion_mnist": ("28,28,1", 10, 60_000),
    "fashion_mnist_best": ("28,28,1", 10, 60_000),
    "fashion_mnist_fast": ("28,28,1", 10, 60_000),
    "folder": ("64,64,3", 10, 8_000),
    "imagenet_resnet50": ("224,224,3", 1000, 1_281_167),
    "imagenet_vit_s16": ("224,224,3", 1000, 1_268_355),
    "medical": ("28,28,1", 2, 4_708),
    "mnist": ("28,28,1", 10, 60_000),
    "traffic_signs": ("32,32,3", 43, 26_640),
    "transfer": ("32,32,3", 5, 2_500),
}


def dry_run(recipe: str, chips: str, out: Path) -> dict[str, Any]:
    """Runs or reuses the dry run of one recipe and returns its JSON."""
    folder = out / recipe
    file = folder / f"dryrun-{chips.replace(':', '-')}.json"
    if not file.is_file():
        shape, classes, examples = DATA[recipe]
        command = [sys.executable, str(ROOT / "launch.py"), "dryrun", f"--config={ROOT}/configs/{recipe}.py",
                   f"--chips={chips}", f"--workdir={folder}", f"--shape={shape}", f"--classes={classes}",
                   f"--examples={examples}"]  # fmt: skip
        print(recipe, chips, file=sys.stderr)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, 1) or not file.is_file():
            raise SystemExit(f"the dry run of {recipe} on {chips} failed")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Formats the rows as a Markdown table."""
    heads = ("recipe", "chips", "batch", "memory of a chip", "bound by", "images/s", "the run", "chip-hours")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for recipe, found in rows.items():
        start = f"| `{recipe}` | {found['chips']} | {found['batch_size']} |"
        if not found["fits"]:
            lines.append(f"{start} does not fit | | | | |")
            continue
        seconds = found["run_seconds"]
        lasts = f"{seconds:.2g} s" if seconds < 600 else f"{seconds / 3600:.2g} h"
        lines.append(f"{start} {found['memory']['peak'] / 1e6:,.0f} MB | {found['bound_by']} | "
                     f"{found['images_per_second']:,.0f} | {lasts} | {found['chip_hours']:.2g} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="v5e:2x4")
    parser.add_argument("--recipes", default=",".join(DATA), help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    args = parser.parse_args()
    text = table({recipe: dry_run(recipe, args.chips, args.out) for recipe in args.recipes.split(",")})
    print(text)
    (args.out / f"recipes-{args.chips.replace(':', '-')}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
