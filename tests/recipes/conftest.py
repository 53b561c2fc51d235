"""The recipes are scripts: their tests import them as Python finds them beside each other."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def path_of_recipes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
        yield
