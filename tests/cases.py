"""Cases of a parametrized test that the default suite leaves out."""

from typing import Any

import pytest


def thorough(*cases: Any) -> list[Any]:
    """Each case, or tuple of arguments, marked `thorough`: more of what the cases beside them check."""
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.thorough) for c in cases]
