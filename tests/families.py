"""The families of models a test runs on: one for each mechanism in `make test`, the others in `make test-families`."""

from collections.abc import Iterable

import pytest


def every(families: Iterable[str], quick: Iterable[str]) -> list:
    """Values for `pytest.mark.parametrize`, of which those that are not `quick` are marked."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.families) for name in families]
