"""Explanations of what a trained model says of images: the method that suits its network, many images at a time."""

import functools
import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from imgclf_jax.core import sharding
from imgclf_jax.core.errors import UserError
from imgclf_jax.core.text import printable
from imgclf_jax.tools.explain import attribution, heatmap
from imgclf_jax.trained import Trained

_TITLES = {
    "gradcam": "Grad-CAM: what speaks for the class",
    "rollout": "attention rollout: what is looked at, for any class",
    "occlusion": "occlusion: how far the probability falls",
}

_ROWS = 8  # images whose maps are computed at once, so that those of large images fit into memory

# (images uint8[n, h, w, c] as the model takes them, their classes int[n]) → maps [n, h', w']
Explain = Callable[[np.ndarray, np.ndarray], np.ndarray]


def build(
    model: Trained, method: str = "auto", layer: str = "", window: int = 0, for_class: bool = False
) -> tuple[str, Explain]:
    """(the method, a function of images uint8[n, h, w, c] and of their classes int[n] that gives the maps [n, h', w']).

    `method` is "gradcam", "rollout", "occlusion", or "auto": the one that suits the network, or, with `for_class`, the
    one of them that tells classes apart. `layer` is for Grad-CAM, `window` for occlusion. A map of several seeds is the
    mean of the seeds' maps, and by occlusion that of their ensemble. Raises UserError for a method or a layer that does
    not suit the network.
    """
    programs, params = model.programs, model.state.evaluated
    recipe, classifier = programs.recipe, attribution.without_remat(programs.recipe.model)
    one_seed = jax.tree.map(lambda x: x[0], params) if recipe.num_seeds > 1 else params
    with programs.tracing():
        variables = {"params": one_seed[0], **one_seed[1]}
        seen = attribution.look(classifier, variables, recipe.data.image_shape)
    if method == "auto":
        method = "gradcam" if layer else "occlusion" if window else seen.best
        method = "occlusion" if method == "rollout" and for_class else method
    if method == "rollout" and for_class:
        raise UserError("rollout shows what the network looks at, which is the same for every class: drop --class, or "
                        "take --method=occlusion")  # fmt: skip
    for flag, value, wants in (("layer", layer, "gradcam"), ("window", window, "occlusion")):
        if value and method != wants:
            raise UserError(f"--{flag} is for --method={wants}, and this is {method}; drop one of the two")
    if method == "occlusion":
        size = sharding.round_up(min(model.config.batch_size, 128), programs.mesh)
        probabilities = functools.partial(predict, model, size=size)
        return method, lambda images, labels: attribution.occlusion(probabilities, images, labels, window, size)
    augment, seeds = recipe.augment(train=False), recipe.num_seeds
    pure = programs.gather_at_use(
        attribution.make_gradcam(classifier, augment, attribution.choose_layer(seen, layer), seeds)
        if method == "gradcam"
        else attribution.make_rollout(classifier, augment, seen, seeds),
        of_seeds=True,
    )

    @functools.partial(jax.jit, out_shardings=sharding.replicated(programs.mesh))
    def traced(*args: Any) -> jax.Array:
        with programs.tracing():
            return pure(*args)

    def explain(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        size = 1 if len(images) == 1 else _ROWS  # two shapes at most, so two compilations
        maps = []
        for start in range(0, len(images), size):
            rows = np.minimum(np.arange(start, start + size), len(images) - 1)  # the last one is repeated
            maps.append(np.asarray(traced(*params, images[rows], labels[rows].astype(np.int32))))
        return np.concatenate(maps)[: len(images)]

    return method, explain


def drawn(
    method: str, explain: Explain, pixels: np.ndarray, label: int, says: str, numbers: bool = False
) -> tuple[bytes, np.ndarray]:
    """(a PNG of the image beside its map over it, below the line `says` and the method's; the map [h', w']).

    `pixels` are uint8[h, w, c] as the model takes them, `label` is the class, or the target of a
    model of `numbers`; the other two are those of `build`.
    """
    [values] = explain(pixels[None], np.array([label]))
    words = _TITLES[method]
    if numbers:
        words = words.replace("probability", "value").replace("for the class", "for a greater value")
    title = [printable(says), words]
    content = io.BytesIO()
    heatmap.draw(pixels, values, method == "occlusion", title).save(content, "PNG")
    return content.getvalue(), values


def predict(model: Trained, images: np.ndarray, size: int = 1) -> np.ndarray:
    """The probabilities f32[b, classes] of b images uint8[b, h, w, c] as `Trained.prepare` gives them.

    `size` bounds b, and is the size of the batch: calls with one `size` compile one program.
    """
    mesh = model.programs.mesh
    size = sharding.round_up(size, mesh)
    batch = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), np.uint8)])
    here = batch[sharding.rows_here(size, mesh)]
    out = model.programs.predict(*model.state.evaluated, sharding.put_batch({"image": here}, mesh)["image"])
    return np.asarray(jax.device_get(out))[: len(images)]
