"""Tests of several processes start them as those in tests/distributed do."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1] / "distributed"))
