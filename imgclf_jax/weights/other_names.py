"""Names of PyTorch models that follow from the whole model: rows as in `torch_names`, made for its names here."""

import re
from collections.abc import Collection


def lukemelas(names: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Rows of lukemelas/EfficientNet-PyTorch, which numbers the blocks of all stages in one list."""
    rows = [("head", "_fc"), ("backbone.conv_stem", "_conv_stem"), ("backbone.bn1", "_bn0"),
            ("backbone.conv_head", "_conv_head"), ("backbone.bn2", "_bn1")]  # fmt: skip
    blocks = {name.split("/")[2] for name in names if name.startswith("params/backbone/stage")}
    for n, block in enumerate(sorted(blocks, key=lambda block: [int(i) for i in re.findall(r"\d+", block)])):
        expands = f"params/backbone/{block}/conv_pwl/kernel" in names
        layers = {
            "conv_dw": "depthwise_conv",
            "se.reduce": "se_reduce",
            "se.expand": "se_expand",
            "conv_pwl" if expands else "conv_pw": "project_conv",
            **{f"bn{k + expands}": f"bn{k}" for k in range(3)},
        }
        layers |= {"conv_pw": "expand_conv"} if expands else {}
        rows += [(f"backbone.{block}.{ours}", f"_blocks.{n}._{theirs}") for ours, theirs in layers.items()]
    return tuple(rows)
