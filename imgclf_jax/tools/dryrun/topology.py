"""`--chips=v5e:4x4`, `h100:8`, `a100:8x8` or `cpu:8`: absent devices to compile for."""

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from imgclf_jax.core import extras
from imgclf_jax.core.errors import UsageError, UserError
from imgclf_jax.tools.dryrun import table

_COMPILERS = {"tpu": "tpu", "gpu": "cuda-compiler"}  # the extra with the compiler of each platform
_NAMES = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}  # accelerator types of the TPU runtime
ALLOWED = "allowed: v5e:4x4, v6e:8x8 (rows x columns), v5p:4x4x4, h100:8 or a100:8x8 (hosts x GPUs), cpu:8"


@dataclass(frozen=True)
class Chips:
    """Chips of one kind, and their topology."""

    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    @property
    def platform(self) -> str:
        """JAX's platform: "tpu", "gpu" or "cpu"."""
        return "cpu" if self.kind == "cpu" else table.CHIPS[self.kind].platform


def parse(text: str) -> Chips:
    """Parses chips such as 'v5e:4x4'. Raises UsageError for any other text."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    if not match or match[1] not in (*table.CHIPS, "cpu"):
        raise UsageError(f"--chips={text}: {ALLOWED}")
    kind, shape = match[1], tuple(map(int, match[2].split("x")))
    ranks = {"v5e": (2,), "v6e": (2,), "v5p": (3,), "h100": (1, 2), "a100": (1, 2), "cpu": (1,)}[kind]
    if len(shape) not in ranks or 0 in shape:
        raise UsageError(f"--chips={text}: {ALLOWED}")
    chips = Chips(kind, shape)
    if chips.platform == "gpu" and shape[-1] > (most := table.CHIPS[kind].a_host):
        raise UsageError(f"--chips={text}: a host has at most {most} of these GPUs; {ALLOWED}")
    return chips


def parse_shape(text: str) -> tuple[int, int, int] | None:
    """Parses "224,224,3" to (224, 224, 3), and "" to None. Raises UsageError for any other text."""
    if not text:
        return None
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", text):
        raise UsageError(f"--shape={text}: must be height, width and channels, such as 224,224,3")
    height, width, channels = map(int, text.split(","))
    return height, width, channels


def prepare_from_flags(chips: str, shape: str, classes: int | None, targets: int | None, **_: object) -> None:
    """Checks the flags of `dryrun`, and prepares for its chips."""
    if not chips:
        raise UsageError(f"dryrun needs --chips, the chips to compile for; {ALLOWED}")
    parse_shape(shape)
    if classes and targets:
        raise UsageError("give --classes or --targets, not both: an example has a class or targets")
    prepare(parse(chips))


def prepare(chips: Chips) -> None:
    """Sets environment variables that JAX and the compilers read on import. Call it before importing JAX.

    Raises UserError, with the command to install it, if the compiler for these chips is missing.
    """
    if chips.platform in _COMPILERS:
        extras.require(_COMPILERS[chips.platform], f"--chips={chips}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # leaves this machine's chips alone
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the report has compile times
    flags = os.environ.get("XLA_FLAGS", "").split()
    if chips.platform == "tpu":
        os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost")
        os.environ["TPU_ACCELERATOR_TYPE"] = f"{_NAMES[chips.kind]}-8"
    elif chips.platform == "gpu":
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        # Autotuning needs a GPU.
        flags += ["--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["JAX_NUM_CPU_DEVICES"] = str(chips.count if chips.kind == "cpu" else 1)


def devices(chips: Chips) -> list[Any]:
    """Returns JAX devices to compile for, in mesh order; only those of `cpu` can run programs.

    Raises UserError for a topology that the compiler does not know.
    """
    import jax
    from jax.experimental import topologies

    if chips.kind == "cpu":
        return list(jax.devices("cpu"))
    settings: dict[str, Any] = {"platform": "tpu", "topology_name": str(chips)}
    if chips.platform == "gpu":
        hosts, each = (1, *chips.shape)[-2:]
        target = {"target_config": table.gpu_target(chips.kind), "topology": f"1x{hosts}x{each}"}
        settings = {"platform": "cuda", "topology_name": chips.kind, **target}
    try:
        return list(topologies.get_topology_desc(**settings).devices)
    except Exception as e:
        raise UserError(f"--chips={chips}: the compiler rejects it: {str(e).splitlines()[0][:200]}; {ALLOWED}") from e
