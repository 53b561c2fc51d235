"""The recipes are scripts: their tests import them as Python finds them beside each other."""

from pathlib import Path

import pytest
from transformers.utils import logging


@pytest.fixture(scope="module", autouse=True)
def path_of_recipes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))
        yield


@pytest.fixture(scope="module", autouse=True)
def loudness_of_libraries():
    """A script may silence transformers for good; the tests that follow want to hear it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
