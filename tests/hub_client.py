"""A process that talks to a test server with the real clients, which read where the Hub is once, at import.

It does what it is told, one job of hub_jobs.py after the other: starting it costs seconds, a job none.
"""

import json
import os
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).parent


class Client:
    """A context manager; `call(job, **arguments)` gives the job's result, or {"error": [type, message]}."""

    def __init__(self, variables, home, **environment):
        environment = {
            **os.environ,
            **variables,
            "HF_HOME": str(home),
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        environment.pop("HF_TOKEN", None)
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "hub_jobs.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment, cwd=home,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()

    def start(self, job, **arguments):
        """Begin a job; `result` waits for it."""
        self.process.stdin.write(json.dumps([job, arguments]) + "\n")
        self.process.stdin.flush()

    def result(self):
        line = self.process.stdout.readline()
        assert line, "the client's process has died"
        return json.loads(line)

    def call(self, job, **arguments):
        self.start(job, **arguments)
        return self.result()
