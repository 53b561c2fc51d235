"""What the tests in this folder need beyond those of the `test` extra."""

from importlib.util import find_spec


# DeepSpeed is nobody's dependency here, and a user's choice: `pip install deepspeed` has its tests collected.
collect_ignore = [] if find_spec("deepspeed") else ["test_deepspeed.py"]
