"""Explanations of a trained model's predictions, by the method that fits its network, in batches."""

import functools
import io
from collections.abc import Callable

import jax
import numpy as np

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.core.typing import PyTree
from imgclf_jax.tools.explain import attribution, heatmap
from imgclf_jax.trained import Trained

TITLES = {"gradcam": "Grad-CAM: evidence for the class", "occlusion": "occlusion: drop of the probability"}

_ROWS = 8  # images per batch; more large ones may not fit into memory

# (images uint8[n, h, w, c] after the host ops, classes int[n]) → maps [n, h', w']
type Explain = Callable[[np.ndarray, np.ndarray], np.ndarray]


def build(model: Trained, method: str = "auto", layer: str = "", window: int = 0) -> tuple[str, Explain]:
    """Returns the name of the method, and the function that explains images.

    - `method` is "gradcam", "occlusion", or "auto" for the one that fits the network.
    - `layer` is for Grad-CAM, `window` for occlusion; see `attribution`.

    The map of several seeds is the mean of the seeds' maps; occlusion explains their ensemble. Raises UserError if the
    method or the layer does not fit the network.
    """
    programs, params = model.programs, model.state.evaluated
    recipe, classifier = programs.recipe, attribution.without_remat(programs.recipe.model)
    one_seed = jax.tree.map(lambda x: x[0], params) if recipe.config.num_seeds > 1 else params
    with programs.tracing():
        layers = attribution.inspect(classifier, {"params": one_seed[0], **one_seed[1]}, recipe.data.image_shape)
    if method == "auto":
        method = "gradcam" if layer else "occlusion" if window else attribution.best_method(layers)
    for flag, value, needed in (("layer", layer, "gradcam"), ("window", window, "occlusion")):
        if value and method != needed:
            raise UserError(f"--{flag} needs --method={needed}, but the method is {method}; drop one of the two")
    if method == "occlusion":
        size = sharding.round_up(min(model.config.batch_size, 128), programs.mesh)
        probabilities = functools.partial(predict, model, size=size)
        return method, lambda images, labels: attribution.occlusion(probabilities, images, labels, window, size)
    chosen = attribution.choose_layer(layers, layer)
    pure = attribution.make_gradcam(classifier, recipe.augment(train=False), chosen, recipe.config.num_seeds)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(programs.mesh))
    def traced(*args: PyTree) -> jax.Array:
        with programs.tracing():
            return pure(*args)

    def explain(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        size = 1 if len(images) == 1 else _ROWS  # at most two shapes, so two compilations
        maps = []
        for start in range(0, len(images), size):
            rows = np.minimum(np.arange(start, start + size), len(images) - 1)  # repeats the last one
            maps.append(np.asarray(traced(*params, images[rows], labels[rows].astype(np.int32))))
        return np.concatenate(maps)[: len(images)]

    return method, explain


def draw(method: str, explain: Explain, pixels: np.ndarray, label: int, title: str) -> tuple[bytes, np.ndarray]:
    """Returns a PNG of the image next to its heatmap, below `title` and the method's title, and the map [h', w'].

    `pixels` are uint8[h, w, c] after the host ops; `label` is the class; `method` and `explain` come from `build`.
    """
    [values] = explain(pixels[None], np.array([label]))
    content = io.BytesIO()
    heatmap.draw(pixels, values, method == "occlusion", [printable(title), TITLES[method]]).save(content, "PNG")
    return content.getvalue(), values


def predict(model: Trained, images: np.ndarray, size: int = 1, ranked: bool = False) -> np.ndarray:
    """Returns the probabilities f32[b, classes] of images uint8[b, h, w, c] from `Trained.prepare`.

    With `ranked`, f32[2, b, classes]: the probabilities, and the logits that order the classes.
    Batches are padded to `size`, at least b, so that calls with the same `size` share one program.
    """
    mesh = model.programs.mesh
    batch = np.zeros((sharding.round_up(size, mesh), *images.shape[1:]), np.uint8)
    batch[: len(images)] = images
    program = model.programs.inference("ranked" if ranked else "predict")
    out = program(*model.state.evaluated, sharding.put_batch(batch, mesh))
    return np.asarray(out)[..., : len(images), :]
