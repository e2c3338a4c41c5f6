"""Runs the authors' programs for ImageNet-C and CIFAR-10-C on the draws of this project's, and writes fixtures/.

With github.com/hendrycks/robustness cloned, and scikit-image, OpenCV 5 and imagecorruptions 1.1.2 in the environment:

    uv run python tests/tools/evaluate/test_corruptions.py draws.npz
    python tests/tools/evaluate/corruption_fixtures.py robustness/ImageNet-C/create_c draws.npz

ImageMagick's motion blur, which the programs reach by Wand, is that of imagecorruptions, rounded to whole levels.
"""

import ast
import io
import sys
import types
from pathlib import Path

import cv2
import numpy as np
import scipy.ndimage
import skimage as sk
from PIL import Image
from scipy import stats

for name, content in (("scipy.ndimage.interpolation", {"map_coordinates": scipy.ndimage.map_coordinates}),
                      ("pkg_resources", {"resource_filename": None})):  # fmt: skip
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)
np.float_, np.fromstring = np.float64, lambda blob, dtype: blob  # noqa: NPY201
cv2.imdecode = lambda blob, flags: blob
from imagecorruptions.corruptions import _motion_blur  # noqa: E402


class MotionImage:
    def __init__(self, blob):
        self.image = np.asarray(Image.open(blob if hasattr(blob, "read") else io.BytesIO(blob)))

    def motion_blur(self, radius, sigma, angle):
        self.image = np.floor(_motion_blur(self.image.astype(np.float64), radius, sigma, angle) + 0.5)

    def make_blob(self):
        return self.image[..., ::-1] if self.image.ndim == 3 else self.image  # OpenCV's order


def gaussian(image, sigma, multichannel=False, **more):
    return sk.filters.gaussian(image, sigma=sigma, channel_axis=-1 if multichannel else None, **more)


def injected(name, draws):
    """A stand-in for np.random that returns these draws, in the order of the programs' calls."""
    random, grids = types.SimpleNamespace(), []
    random.normal = lambda size, scale, loc=0.0: loc + scale * draws[0].astype(np.float64)
    random.poisson = lambda mean: stats.poisson.ppf(draws[0].astype(np.float64), mean).clip(0)
    if name == "glass_blur":
        h, w = draws[0].shape[-2:]
        reach = int(-draws[0].min())
        moves = iter([draws[0][i, ::-1, y, x] for i in range(len(draws[0]))
                      for y in range(h - reach, reach, -1) for x in range(w - reach, reach, -1)])  # fmt: skip
        random.randint = lambda low, high, size: next(moves)
    if name == "fog":
        n = len(draws[0])
        for step in (n >> i for i in range(n.bit_length() - 1)):
            half = step // 2
            grids += [draws[0][y::step, x::step] for y, x in ((half, half), (0, half), (half, 0))]
    if name == "elastic_transform":
        grids += [draws[0], draws[1][..., 0], draws[1][..., 1]]
    if name in ("motion_blur", "snow"):
        random.uniform = lambda low, high: float(draws[-1])
    else:
        each = iter(grids)
        random.uniform = lambda low, high, size: high * next(each).astype(np.float64)
    return random


def functions(file):
    """The functions of a program, without the code it runs at import."""
    fromarray = lambda array, mode=None: Image.fromarray(array)  # noqa: E731
    pil = types.SimpleNamespace(**{**vars(Image), "fromarray": fromarray, "BOX": Image.Resampling.BOX})
    found = {"np": types.SimpleNamespace(**vars(np)), "sk": sk, "cv2": cv2, "PILImage": pil, "gaussian": gaussian,
             "BytesIO": io.BytesIO, "MotionImage": MotionImage, "scizoom": scipy.ndimage.zoom,
             "map_coordinates": scipy.ndimage.map_coordinates}  # fmt: skip
    body = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    exec(compile(ast.Module(body, []), str(file), "exec"), found)
    return found


def main(programs, draws):
    given, out = np.load(draws), {}
    for side, file in ((32, "make_cifar_c.py"), (224, "make_imagenet_c.py")):
        authors = functions(Path(programs) / file)
        for key in sorted({k.rpartition("/")[0] for k in given.files if k.startswith(f"{side}/")}):
            _, name, severity = key.split("/")
            own = [given[f"{key}/{i}"] for i in range(2) if f"{key}/{i}" in given.files]
            authors["np"].random = injected(name, own)
            made = np.asarray(authors[name](Image.fromarray(given[f"image{side}"]), int(severity)))
            # As np.uint8, which truncates; but for values that float64 has a little below a whole level.
            made = np.floor(np.asarray(made, np.float64) + 1e-7).astype(np.uint8)
            out[key] = made if side == 32 else made[56::112]
    np.savez_compressed(Path(__file__).with_name("fixtures") / "corruptions.npz", **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
