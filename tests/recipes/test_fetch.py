"""Fetching a file: whole or not at all, once, and with the digest that was asked for."""

import hashlib
import socket

import pytest
from file_server import serving


CONTENT = bytes(range(256)) * 5000  # more than one piece
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_a_file_comes_once(tmp_path):
    from fetch import fetch, sha256_of

    path = tmp_path / "new" / "file.pth"
    with serving({"/a/file.pth": CONTENT}) as (url, asked):
        assert fetch(f"{url}/a/file.pth", path, DIGEST.upper()) is True
        assert path.read_bytes() == CONTENT and sha256_of(path) == DIGEST
        assert fetch(f"{url}/a/file.pth", path, DIGEST) is False
        assert asked == ["/a/file.pth"]
    assert [entry.name for entry in path.parent.iterdir()] == ["file.pth"]


@pytest.mark.parametrize(
    ("name", "sha256", "error", "says"),
    [
        ("half", None, RuntimeError, f"only {len(CONTENT) // 2} of {len(CONTENT)} bytes came"),
        ("none", None, RuntimeError, "HTTP Error 404"),
        ("file", "0" * 64, ValueError, f"has the SHA-256 {DIGEST}, not the {'0' * 64} asked for: it was not kept"),
        ("file", "abc", ValueError, "A SHA-256 has 64 hexadecimal digits, got 'abc'"),
    ],
)
def test_nothing_is_left_of_a_file_that_did_not_come_as_it_should(tmp_path, name, sha256, error, says):
    from fetch import fetch

    files = {"/half": CONTENT, "/file": CONTENT}
    with serving(files, broken=("/half",)) as (url, _), pytest.raises(error) as caught:
        fetch(f"{url}/{name}", tmp_path / "file.pth", sha256)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_server(tmp_path):
    from fetch import fetch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"
        with pytest.raises(RuntimeError, match=f"{url} could not be fetched .*refused.*: try again, or"):
            fetch(url, tmp_path / "file.pth")
    with pytest.raises(RuntimeError, match="nowhere could not be fetched .*unknown url type"):
        fetch("nowhere", tmp_path / "file.pth")


def test_a_file_that_is_there_is_compared_too(tmp_path):
    from fetch import fetch

    (tmp_path / "file.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match=f"file.pth has the SHA-256 .*, not the {DIGEST} asked for: it is another"):
        fetch("http://127.0.0.1:9/never", tmp_path / "file.pth", DIGEST)
    assert (tmp_path / "file.pth").read_bytes() == b"other"
