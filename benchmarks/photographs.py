"""JPEG photographs from disk to batches of 224×224×3, beside tf.data, PyTorch and Grain.

    uv run --group peers benchmarks/photographs.py
    uv run --group peers benchmarks/photographs.py --folder=DIR    # your own, one folder per class
    uv run benchmarks/photographs.py --sizes=64x64,28x28 --pipelines="imgclf_jax;imgclf_jax, workers"    # PNG files

Training crops (`random_resized_crop(224)`) in batches of 32 uint8 images, of ImageNet's usual size (500×375), of small
files (256×192) and of a camera's (3000×2250); of narrower images, crops of their width. Each pipeline is a process of
its own, which warms up and then reads for `--seconds`; all take turns, `--rounds` times. Reports images per second and
core, their ratios within a round, and CPU time per image of the process that would train, without its workers' time:
medians over the rounds and [min, max]. The pipelines:

- `imgclf_jax`: the stream of `launch.py train`; Pillow in threads.
- `imgclf_jax, workers`: the same with `data.workers`, one per core.
- `imgclf_jax, draft`: the same with `decode(3, draft=512)`, which decodes large files at a fraction of their size.
- `tf.data`: `decode_and_crop_jpeg` and bilinear `tf.image.resize`, without antialiasing, in a parallel map.
- `torch pillow`: `ImageFolder`, `RandomResizedCrop` and `DataLoader` with a worker per core.
- `torch tensor`: the same with torchvision's JPEG decoder and transforms of tensors.
- `grain`: `MapDataset` with Pillow, and a worker process per core.

By default the photographs are crops of the two that scikit-learn ships, in JPEG quality 90. Writes photographs.json.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from report import cell, machine, now, spread

_BATCH, _SIDE, _WARM_UP = 32, 224, 8  # images, pixels, batches
_SIZES = {"500x375": (500, 375), "256x192": (256, 192), "3000x2250": (3000, 2250), "64x64": (64, 64), "28x28": (28, 28)}
OWN = "imgclf_jax"


def write_photographs(folder: Path, size: tuple[int, int]) -> None:
    """Writes JPEG files of a size (width, height), small ones as PNG, half of them in each of two class folders."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    files, suffix = 512 if size[0] <= 500 else 64, "jpg" if size[0] > 64 else "png"
    photographs = [Image.fromarray(image) for image in load_sample_images().images]  # 640 by 427
    rng = np.random.default_rng(0)
    for i in range(files):
        photograph = photographs[i % 2]
        h = (w := int(rng.integers(400, 560))) * 3 // 4
        left, top = (int(rng.integers(0, have - want + 1)) for have, want in zip(photograph.size, (w, h), strict=True))
        image = photograph.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + w, top + h))
        place = folder / ("china", "flower")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.{suffix}", quality=90)


def side_of(folder: Path) -> int:
    """The side of the crops."""
    from PIL import Image

    return min(_SIDE, Image.open(next(folder.glob("*/*"))).width)


def own(folder: Path, cores: int, decode: str = "decode(3)", workers: bool = False) -> Iterator[Any]:
    """The stream of this project."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from imgclf_jax.run import environment

    environment.prepare(True)
    from imgclf_jax.core import tensorflow_import
    from imgclf_jax.data import sources, stream

    tensorflow_import.tensorflow().result()
    source = sources.open_splits(f"folder({str(folder)!r})")["train"]
    images = stream.Images(source, f"{decode}|random_resized_crop({side_of(folder)})", workers=cores * workers)
    return (batch for _, batch in stream.batches(images, stream.StreamSpec(0, _BATCH), range(10**9)))


def tf_data(folder: Path, cores: int) -> Iterator[Any]:
    """`decode_and_crop_jpeg` in a parallel map."""
    import tensorflow as tf

    files, side = sorted(map(str, folder.glob("*/*"))), side_of(folder)

    def read(path: Any) -> Any:
        content = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(content), tf.zeros([1, 0, 4]), area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3), max_attempts=10, use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        box = tf.stack([begin[0], begin[1], size[0], size[1]])
        return tf.cast(tf.image.resize(tf.io.decode_and_crop_jpeg(content, box, channels=3), (side, side)), tf.uint8)

    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    data = data.map(read, num_parallel_calls=cores).batch(_BATCH).prefetch(2)
    return iter(data.as_numpy_iterator())


def torch_pillow(folder: Path, cores: int) -> Iterator[Any]:
    """`ImageFolder` with Pillow."""
    from torchvision import datasets
    from torchvision.transforms import v2

    crop = v2.Compose([v2.RandomResizedCrop(side_of(folder)), v2.PILToTensor()])
    return _torch_batches(datasets.ImageFolder(folder, crop), cores)


def torch_tensor(folder: Path, cores: int) -> Iterator[Any]:
    """`ImageFolder` with torchvision's decoder."""
    from torchvision import datasets, io
    from torchvision.transforms import v2

    crop, mode = v2.RandomResizedCrop(side_of(folder), antialias=True), io.ImageReadMode.RGB
    return _torch_batches(datasets.ImageFolder(folder, crop, loader=lambda path: io.decode_image(path, mode)), cores)


def _torch_batches(data: Any, cores: int) -> Iterator[Any]:
    import torch

    loader = torch.utils.data.DataLoader(data, _BATCH, shuffle=True, num_workers=cores, drop_last=True,
                                         persistent_workers=True)  # fmt: skip
    return itertools.chain.from_iterable(iter(loader) for _ in itertools.count())


def grain_map(folder: Path, cores: int) -> Iterator[Any]:
    """`MapDataset` with Pillow."""
    import grain
    from absl import flags
    from PIL import Image
    from torchvision.transforms import v2

    flags.FLAGS(["photographs"])  # its workers read some
    files, crop = sorted(folder.glob("*/*")), v2.RandomResizedCrop(side_of(folder))

    def read(path: Path) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(crop(image.convert("RGB")))

    data = grain.MapDataset.source(files).shuffle(seed=0).repeat().map(read).batch(_BATCH)
    return iter(data.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=cores)))


PIPELINES = {
    OWN: own,
    f"{OWN}, workers": functools.partial(own, workers=True),
    f"{OWN}, draft": functools.partial(own, decode="decode(3, draft=512)"),
    "tf.data": tf_data,
    "torch pillow": torch_pillow,
    "torch tensor": torch_tensor,
    "grain": grain_map,
}


def measure(name: str, folder: Path, seconds: float) -> tuple[float, float]:
    """The images per second and core of a pipeline in this process, and its milliseconds of CPU time per image."""
    cores = len(os.sched_getaffinity(0))
    batches = PIPELINES[name](folder, cores)
    for _ in range(_WARM_UP):
        next(batches)
    images, began, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - began) < seconds:
        next(batches)
        images += _BATCH
    return images / elapsed / cores, (time.process_time() - cpu) / images * 1e3


def main(argv: list[str]) -> int:
    """Measures, prints a table and writes photographs.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="photographs to read, one folder per class")
    parser.add_argument("--sizes", default=",".join([*_SIZES][:3]), help="of the default photographs, comma-separated")
    parser.add_argument("--pipelines", default=";".join(PIPELINES), help="separated by semicolons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--only", metavar="PIPELINE", help=argparse.SUPPRESS)  # measures in this process
    args = parser.parse_args(argv)
    if args.only:
        print(json.dumps(measure(args.only, args.folder, args.seconds)), flush=True)
        os._exit(0)  # some pipelines take seconds to stop
    names, sizes = args.pipelines.split(";"), args.sizes.split(",")
    if wrong := [name for name in names if name not in PIPELINES]:
        parser.error(f"unknown pipeline {wrong[0]!r}; allowed are {'; '.join(PIPELINES)}")
    if wrong := [size for size in sizes if size not in _SIZES]:
        parser.error(f"unknown size {wrong[0]!r}; allowed are {', '.join(_SIZES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"arguments": argv, "date": now(), "machine": machine(), "sets": {}, "cpu_ms": {}}
    with tempfile.TemporaryDirectory() as directory:
        folders = {"own": args.folder} if args.folder else {name: Path(directory) / name for name in sizes}
        for title, folder in folders.items():
            if not args.folder:
                write_photographs(folder, _SIZES[title])
            pairs = [{name: _in_process(name, folder, args.seconds) for name in names} for _ in range(args.rounds)]
            rounds, cpu = ([{name: pair[i] for name, pair in each.items()} for each in pairs] for i in (0, 1))
            result["sets"][title], result["cpu_ms"][title] = rounds, cpu
            _print_table(title, rounds, cpu)
            (args.out / "photographs.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"every measurement is in {args.out / 'photographs.json'}")
    return 0


def _in_process(name: str, folder: Path, seconds: float) -> list[float]:
    command = [sys.executable, __file__, f"--only={name}", f"--folder={folder}", f"--seconds={seconds}"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ends with status {done.returncode}:\n{done.stderr[-2000:]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def _print_table(title: str, rounds: list[dict[str, float]], cpu: list[dict[str, float]]) -> None:
    print(f"\n{title}: images per second and core, CPU ms per image, {OWN}'s ratio to it; median [min, max]")
    for name in rounds[0]:
        ratio = spread([each[OWN] / each[name] for each in rounds]) if OWN in rounds[0] and name != OWN else None
        columns = [cell(spread([each[name] for each in of]), form) for of, form in ((rounds, ",.0f"), (cpu, ".3f"))]
        print(f"{name:18}", *(f"{one:>23}" for one in [*columns, cell(ratio, ".2f") if ratio else ""]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
