"""What every test gets: no network but loopback, caches in a temporary folder, one thread, a fixed seed."""

import gc
import os
import socket
import tempfile


# Before transformers, datasets and evaluate are imported: they read these once.
_CACHE = tempfile.TemporaryDirectory(prefix="hf_kd_tests_")
os.environ.update(
    HF_HOME=_CACHE.name,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    MPLCONFIGDIR=os.path.join(_CACHE.name, "matplotlib"),
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("HF_TOKEN", None)
# Of the processes that tests start; this one's threads are set below.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis.configuration import set_hypothesis_home_dir  # noqa: E402


_LOOPBACK = ("127.", "localhost", "::1", "0.0.0.0")


@pytest.fixture(autouse=True)
def block_network(monkeypatch):
    """Connections and look-ups beyond this machine fail as where there is no network, and the test fails for trying.

    Yields the attempts; a test about being offline clears the list.
    """
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo
    attempts = []

    def guarded_connect(self, address):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(_LOOPBACK):
            attempts.append(address)
            raise OSError(f"no network in tests: {address}")
        return connect(self, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        if host is not None and not str(host).startswith(_LOOPBACK):
            attempts.append(host)
            raise socket.gaierror(f"no network in tests: {host}")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield attempts
    assert not attempts, f"the test tried to reach the network: {attempts}"


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


def pytest_collection_finish(session):
    # Accelerate collects garbage before every training run: what the imports made is none.
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    set_hypothesis_home_dir(os.path.join(_CACHE.name, "hypothesis"))
    # Tiny models: a second thread costs more than it gives.
    torch.set_num_threads(1)
