"""The test Hub, driven by the real client library: it gives back what it stores, and its faults are those asked for.

Each script runs in a process of its own, since the client reads its endpoint at import, and prints JSON. It finds
``api``, ``out`` and ``outcome`` there; waits between the client's retries are recorded in ``waits`` and skipped.
"""

import hashlib
import http.client
import json
import os
import subprocess
import sys
import textwrap
import urllib.parse

import pytest
from hub_server import HubServer, check_card


PRELUDE = """
import io, json, os, pathlib, sys, time, warnings
import huggingface_hub as hf
from huggingface_hub import CommitOperationAdd as Add, CommitOperationCopy as Copy, CommitOperationDelete as Delete
from huggingface_hub.utils import logging
logging.set_verbosity_error()
warnings.simplefilter("ignore")
folder = pathlib.Path(os.environ["HF_HOME"])
waits, out, sleep = [], {}, time.sleep
time.sleep = lambda seconds: waits.append(seconds) if seconds >= 1 else sleep(seconds)
api = hf.HfApi()

def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, None if response is None else response.status_code]
"""

WEIGHTS = bytes(range(256)) * 400
CARD = """---
license: mit
library_name: timm
pipeline_tag: image-classification
tags: [distillation]
datasets: [ada/digits]
base_model: timm/resnet18
model-index:
- name: net
  results:
  - task: {type: image-classification}
    dataset: {type: ada/digits, name: Digits}
    metrics: [{type: accuracy, value: 0.5}]
---
# Net
"""


@pytest.fixture
def hub():
    with HubServer(page_size=3) as server:
        server.add_user("ada", "hf_ada", orgs=["lab"])
        server.add_user("bob", "hf_bob")
        server.add_user("eve", "hf_eve", orgs=["ada"], can_write=False)
        yield server


@pytest.fixture
def client(hub, tmp_path):
    """Run a script with the client library and return what it put into ``out``."""

    def run(script, token="hf_ada"):
        environment = {**os.environ, **hub.variables(), "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
        os.makedirs(environment["HF_HOME"], exist_ok=True)
        code = PRELUDE + textwrap.dedent(script) + "\nprint(json.dumps(out))\n"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def asked(hub, method, part=""):
    """The answers' status of the requests with this method whose path contains ``part``."""
    return [request.status for request in hub.requests if request.method == method and part in request.path]


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def raw(hub, method, path, body=b"", token=None, **headers):
    """One request without the client library: status, headers and body."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(hub.url).netloc, timeout=10)
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    result = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return result


def test_accounts_and_repositories(hub, client):
    hub.create_repo("bob/open")
    hub.create_repo("bob/secret", private=True)
    hub.create_repo("lab/secret", type="dataset", private=True)
    out = client("""
        who = api.whoami()
        out["who"] = [who["name"], [org["name"] for org in who["orgs"]], who["auth"]["accessToken"]["role"]]
        out["bad token"] = outcome(api.whoami, token="hf_nobody")
        out["no token"] = outcome(api.model_info, "bob/secret", token=False)
        out["stranger"] = outcome(api.model_info, "bob/secret")
        out["bad token on an open one"] = outcome(api.model_info, "bob/open", token="hf_nobody")
        out["download"] = outcome(hf.hf_hub_download, "bob/secret", ".gitattributes")
        out["owner"] = api.model_info("bob/secret", token="hf_bob").private
        out["member"] = api.dataset_info("lab/secret").id
        created = [api.create_repo("net", private=True), api.create_repo("lab/data", repo_type="dataset")]
        out["created"] = [str(url) for url in created]
        out["again"] = outcome(api.create_repo, "ada/net"), str(api.create_repo("ada/net", exist_ok=True))
        out["foreign"] = outcome(api.create_repo, "bob/net"), str(api.create_repo("bob/open", exist_ok=True))
        out["read only"] = outcome(api.create_repo, "eve/net", token="hf_eve")
        out["anonymous"] = outcome(api.create_repo, "ada/other", token=False)
        out["exists"] = [api.repo_exists(name) for name in ("ada/net", "ada/none", "bob/secret", "none")]
        for token in ("hf_ada", "hf_eve"):
            out["write " + token] = outcome(
                api.upload_file, path_or_fileobj=b"x", path_in_repo="x", repo_id="bob/open", token=token
            )
        api.move_repo("ada/net", "lab/net2")
        moves = [("lab/net2", "bob/net"), ("bob/open", "ada/open")]
        out["foreign move"] = [outcome(api.move_repo, *move) for move in moves]
        out["moved"] = api.model_info("ada/net").id, api.model_info("lab/net2").private
        out["delete"] = outcome(api.delete_repo, "bob/open"), outcome(api.delete_repo, "ada/none")
        api.delete_repo("lab/data", repo_type="dataset")
    """)
    missing = ["RepositoryNotFoundError", 404]
    assert out["who"] == ["ada", ["lab"], "write"]
    assert out["bad token"] == ["HfHubHTTPError", 401]
    assert out["no token"] == ["RepositoryNotFoundError", 401]
    assert out["stranger"] == missing
    assert out["bad token on an open one"] == ["HfHubHTTPError", 401]
    assert out["download"][0] == "RepositoryNotFoundError"
    assert out["owner"] is True
    assert out["member"] == "lab/secret"
    assert out["created"] == [f"{hub.url}/ada/net", f"{hub.url}/datasets/lab/data"]
    assert out["again"] == [["HfHubHTTPError", 409], f"{hub.url}/ada/net"]
    assert out["foreign"] == [["HfHubHTTPError", 403], f"{hub.url}/bob/open"]
    assert out["read only"] == ["HfHubHTTPError", 403]
    assert out["anonymous"] == ["HfHubHTTPError", 401]
    assert out["exists"] == [True, False, False, False]
    assert out["write hf_ada"] == out["write hf_eve"] == ["HfHubHTTPError", 403]
    assert len(hub.commits("bob/open")) == 1
    assert out["foreign move"] == [["HfHubHTTPError", 403]] * 2
    assert out["moved"] == ["lab/net2", True]
    assert out["delete"] == [["HfHubHTTPError", 403], missing]
    assert sorted(hub.repos()) == [
        ("dataset", "lab/secret", True),
        ("model", "bob/open", False),
        ("model", "bob/secret", True),
        ("model", "lab/net2", True),
    ]
    assert hub.requests[0].path == "/api/whoami-v2" and hub.requests[0].token == "hf_ada"


def test_upload_and_read_back(hub, client, tmp_path):
    files = {
        "README.md": CARD.encode(),
        "config.json": b'{"a": 1}',
        "empty.bin": b"",
        "model.safetensors": WEIGHTS,
        "sub/deeper/notes.txt": "é".encode() * 400,
        "sub/blob.dat": b"\x00\xff",
        "sub/plain.txt": b"plain",
    }
    for name, content in files.items():
        path = tmp_path / "net" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    out = client(f"""
        source = {str(tmp_path / "net")!r}
        api.create_repo("ada/net")
        first = api.upload_folder(repo_id="ada/net", folder_path=source, commit_message="One",
                                  commit_description="why")
        out["first"] = first.oid, first.commit_url
        out["second"] = api.upload_folder(repo_id="ada/net", folder_path=source).oid
        info = api.model_info("ada/net", files_metadata=True)
        out["info"] = [info.sha, info.private, info.tags, info.pipeline_tag, info.library_name, info.card_data.license]
        out["siblings"] = [[s.rfilename, s.size, s.blob_id, s.lfs and s.lfs.sha256] for s in info.siblings]
        out["index"] = info.model_index[0]["results"][0]["metrics"][0]["value"], len(info.card_data.eval_results)
        kept = api.model_info("ada/net", revision="main", expand=["sha", "cardData"])
        out["expand"] = kept.sha, kept.card_data.base_model, kept.siblings
        tree = api.list_repo_tree("ada/net", recursive=True, expand=True)
        out["tree"] = [[row.path, type(row).__name__, row.last_commit.title] for row in tree]
        out["top"] = [row.path for row in api.list_repo_tree("ada/net")]
        out["folder"] = [row.path for row in api.list_repo_tree("ada/net", "sub/deeper")]
        out["no folder"] = outcome(list, api.list_repo_tree("ada/net", "sub/none"))
        info = api.get_paths_info("ada/net", ["model.safetensors", "sub", "none"])
        out["paths"] = [[row.path, getattr(row, "size", None)] for row in info]
        local = pathlib.Path(hf.snapshot_download("ada/net"))
        out["local"] = str(local)
        out["download"] = hf.hf_hub_download("ada/net", "model.safetensors", revision=first.oid)
        out["missing"] = outcome(hf.hf_hub_download, "ada/net", "adapter_config.json")
        out["revision"] = outcome(hf.hf_hub_download, "ada/net", "config.json", revision="none")
        out["no revision"] = outcome(api.model_info, "ada/net", revision="none")
        out["commits"] = [[c.title, c.message, c.authors] for c in api.list_repo_commits("ada/net")]
        meta = hf.get_hf_file_metadata(hf.hf_hub_url("ada/net", "model.safetensors"))
        out["meta"] = meta.etag, meta.size, meta.commit_hash
        api.delete_file("config.json", "ada/net")
        api.create_commit("ada/net", commit_message="Move", operations=[
            Copy("sub/blob.dat", "copy.dat"), Copy("sub/plain.txt", "copy.txt"), Delete("sub/", is_folder=True)])
        out["gone"] = outcome(api.delete_file, "config.json", "ada/net")
        out["rest"] = api.list_repo_files("ada/net")
    """)
    oid, url = out["first"]
    initial = hub.files("ada/net", oid)
    attributes = initial.pop(".gitattributes")
    assert initial == files
    assert url == f"{hub.url}/ada/net/commit/{oid}"
    assert out["second"] == oid
    head, deletion, first, created = hub.commits("ada/net")
    assert first.oid == oid and (first.title, first.message, first.author) == ("One", "why", "ada")
    assert first.changed == tuple(sorted(files)) and created.title == "initial commit"
    assert deletion.changed == ("config.json",)
    tags = ["timm", "image-classification", "distillation", "dataset:ada/digits", "base_model:timm/resnet18"]
    assert out["info"] == [oid, False, [*tags, "license:mit"], "image-classification", "timm", "mit"]
    lfs = ("model.safetensors", "sub/blob.dat")
    everything = {".gitattributes": attributes, **files}
    for name, size, blob, sha256 in out["siblings"]:
        content = everything.pop(name)
        assert size == len(content)
        assert sha256 == (hashlib.sha256(content).hexdigest() if name in lfs else None)
        assert (blob == git_sha1(content)) == (name not in lfs)
    assert everything == {}
    assert out["index"] == [0.5, 1]
    assert out["expand"] == [oid, "timm/resnet18", None]
    expected = [[name, "RepoFile", "One"] for name in files] + [["sub", "RepoFolder", "One"]]
    expected += [["sub/deeper", "RepoFolder", "One"], [".gitattributes", "RepoFile", "initial commit"]]
    assert out["tree"] == sorted(expected)
    assert len(asked(hub, "GET", "cursor=")) >= 3
    assert out["top"] == [".gitattributes", "README.md", "config.json", "empty.bin", "model.safetensors", "sub"]
    assert out["folder"] == ["sub/deeper/notes.txt"]
    assert out["no folder"] == ["RemoteEntryNotFoundError", 404]
    assert out["paths"] == [["model.safetensors", len(WEIGHTS)], ["sub", None]]
    for name, content in files.items():
        with open(os.path.join(out["local"], name), "rb") as file:
            assert file.read() == content
    assert os.path.basename(out["local"]) == oid
    assert out["download"] == os.path.join(out["local"], "model.safetensors")
    assert out["missing"] == ["RemoteEntryNotFoundError", 404]
    assert out["revision"] == out["no revision"] == ["RevisionNotFoundError", 404]
    assert out["commits"] == [["One", "why", ["ada"]], ["initial commit", "", ["ada"]]]
    assert out["meta"] == [hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS), oid]
    assert out["gone"] == ["RemoteEntryNotFoundError", 404]
    left = {".gitattributes", "README.md", "empty.bin", "model.safetensors", "copy.dat", "copy.txt"}
    assert set(out["rest"]) == left == set(hub.files("ada/net"))
    assert hub.files("ada/net")["copy.dat"] == b"\x00\xff" and head.files["copy.dat"].lfs
    assert hub.files("ada/net")["copy.txt"] == b"plain"
    # Two objects; the second upload and the copy sent none.
    assert asked(hub, "PUT") == [200, 200] == asked(hub, "POST", "/verify")


def test_revisions_conflicts_and_pull_requests(hub, client):
    hub.create_repo("ada/net")
    base = hub.seed("ada/net", {"a.txt": b"1"})
    hub.seed("ada/net", {"b.txt": b"2", "a.txt": b"1+"}, message="Later")
    out = client(f"""
        base = {base!r}
        def put(path, content=None, token="hf_ada", **where):
            adds = [Add(path, content or path.encode())]
            return api.create_commit("ada/net", adds, commit_message=path, token=token, **where)
        out["conflict"] = outcome(put, "c.txt", parent_commit=base)
        out["fits"] = put("c.txt", b"here", parent_commit=api.model_info("ada/net").sha[:7]).oid
        out["no branch"] = outcome(put, "x.txt", revision="none")
        api.create_branch("ada/net", branch="dev/x", revision=base)
        out["branch again"] = outcome(api.create_branch, "ada/net", branch="dev/x")
        out["on branch"] = put("d.txt", revision="dev/x").oid
        api.create_tag("ada/net", tag="v1", revision="dev/x")
        out["tag again"] = outcome(api.create_tag, "ada/net", tag="v1")
        out["on tag"] = outcome(put, "e.txt", revision="v1")
        out["no start"] = outcome(api.create_branch, "ada/net", branch="y", revision="none")
        pr = put("p.txt", token="hf_bob", create_pr=True)
        out["pr"] = pr.pr_num, pr.pr_url, pr.pr_revision
        put("p2.txt", token="hf_bob", revision=pr.pr_revision)
        out["not his"] = outcome(put, "q.txt", token="hf_bob")
        out["read"] = [pathlib.Path(hf.hf_hub_download("ada/net", name, revision=at)).read_text() for name, at in
                       [("d.txt", "v1"), ("d.txt", "dev/x"), ("p2.txt", "refs/pr/1"), ("a.txt", base)]]
        refs = api.list_repo_refs("ada/net", include_pull_requests=True)
        out["refs"] = [[r.ref for r in group] for group in (refs.branches, refs.tags, refs.pull_requests)]
        out["open"] = api.get_discussion_details("ada/net", 1).status
        out["discussions"] = [discussion.num for discussion in api.get_repo_discussions("ada/net")]
        out["no merge"] = outcome(api.merge_pull_request, "ada/net", 1, token="hf_bob")
        api.merge_pull_request("ada/net", 1)
        out["merged"] = api.get_discussion_details("ada/net", 1).status
        put("c.txt", token="hf_bob", create_pr=True, parent_commit=base)
        out["cannot merge"] = outcome(api.merge_pull_request, "ada/net", 2)
        api.delete_branch("ada/net", branch="dev/x")
        api.delete_tag("ada/net", tag="v1")
        out["twice"] = outcome(api.delete_tag, "ada/net", tag="v1")
        out["main"] = outcome(api.delete_branch, "ada/net", branch="main")
    """)
    unknown = ["RevisionNotFoundError", 404]
    assert out["conflict"] == ["HfHubHTTPError", 412]
    assert out["no branch"] == out["on tag"] == out["no start"] == out["twice"] == unknown
    assert out["branch again"] == out["tag again"] == ["HfHubHTTPError", 409]
    assert out["cannot merge"] == ["HfHubHTTPError", 409]
    assert set(hub.files("ada/net", "refs/pr/2")) == {".gitattributes", "a.txt", "c.txt"}
    assert out["pr"] == [1, f"{hub.url}/ada/net/discussions/1", "refs/pr/1"]
    assert out["not his"] == out["no merge"] == out["main"] == ["HfHubHTTPError", 403]
    assert out["read"] == ["d.txt", "d.txt", "p2.txt", "1"]
    assert out["refs"] == [["refs/heads/main", "refs/heads/dev/x"], ["refs/tags/v1"], ["refs/pr/1"]]
    assert out["open"] == "open" and out["discussions"] == [1]
    assert out["merged"] == "merged"
    main = {"a.txt": b"1+", "b.txt": b"2", "c.txt": b"here", "p.txt": b"p.txt", "p2.txt": b"p2.txt"}
    found = hub.files("ada/net")
    del found[".gitattributes"]
    assert found == main
    assert [commit.title for commit in hub.commits("ada/net")] == [
        "p.txt (#1)",
        "c.txt",
        "Later",
        "Seed",
        "initial commit",
    ]
    assert hub.commits("ada/net")[1].oid == out["fits"]
    assert sorted(hub.refs("ada/net")) == ["refs/heads/main", "refs/pr/1", "refs/pr/2"]
    assert set(hub.files("ada/net", out["on branch"])) == {".gitattributes", "a.txt", "d.txt"}


def test_cards_and_results(hub, client):
    hub.create_repo("ada/net")
    good = b"- dataset: {id: ada/digits, task_id: default}\n  value: 0.5\n  date: '2025-01-02'\n"
    bad = good.replace(b"'2025-01-02'", b"2025-01-02")
    hub.seed("ada/net", {".eval_results/good.yaml": good, ".eval_results/bad.yaml": bad})
    out = client(f"""
        card = hf.ModelCard({CARD!r})
        out["valid"] = outcome(card.validate)
        out["pushed"] = card.push_to_hub("ada/net")
        hf.metadata_update("ada/net", {{"license": "apache-2.0"}}, overwrite=True)
        out["license"] = hf.ModelCard.load("ada/net").data.license
        def put_card(text):
            return api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="ada/net")
        bad = ["a: [b", "license: my-own", "model-index: [{{results: []}}]"]
        out["bad"] = [outcome(put_card, "---\\n" + text + "\\n---\\n") for text in bad]
        out["none"] = type(put_card("# No block")).__name__
        results = api.model_info("ada/net", expand=["evalResults"]).eval_results
        out["results"] = [[r.dataset_id, r.task_id, r.value, r.date] for r in results]
    """)
    assert out["valid"] is None
    assert out["license"] == "apache-2.0"
    assert out["bad"] == [["ValueError", None]] * 3
    assert out["none"] == "CommitInfo"
    assert [commit.changed for commit in hub.commits("ada/net")[:3]] == [("README.md",)] * 3
    assert out["results"] == [["ada/digits", "default", 0.5, "2025-01-02"]]
    tokens = {request.token for request in hub.requests if request.path == "/api/validate-yaml"}
    assert tokens == {None, "hf_ada"}


@pytest.mark.parametrize(
    ("block", "errors"),
    [
        ("license: mit", 0),
        ("license: other\ntags:\nmodel-index: []", 0),
        ("license: [mit, apache-2.0]\nbase_model: [a/b, c/d]", 0),
        ("- a", 1),
        ("license: Apache", 1),
        ("license: [{a: b}]", 1),
        ("pipeline_tag: [a]\nlibrary_name: 1", 2),
        ("tags: a\ndatasets: [1]", 2),
        ("base_model: [1]", 1),
        ("model-index: {}", 1),
        ("model-index: [{name: a, results: [{}]}]", 4),
        ("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d, name: D}, metrics: []}]}]", 1),
        ("model-index: [{name: a, results: [{task: {}, dataset: {type: d}, metrics: [{type: x, value: 0}]}]}]", 2),
        ("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: x}]}]}]", 2),
    ],
)
def test_checks_of_metadata(block, errors):
    found, warnings = check_card(f"---\n{block}\n---\ntext")
    assert len(found) == errors, found
    assert warnings == []


def test_a_card_without_metadata_only_warns():
    for text in ("# A", "---\n---\n", "", "text\n---\na: b\n---\n"):
        assert check_card(text) == ([], ["empty or missing yaml metadata in repo card"])


def test_faults_and_the_clients_retries(hub, client):
    hub.create_repo("ada/net")
    hub.fail("POST", "/preupload/", times=2)
    hub.fail("POST", "objects/batch", status=429, headers={"Retry-After": "7"})
    hub.drop("PUT", "/lfs/", bytes_read=2000)
    hub.fail("PUT", "/lfs/", status=500)
    hub.drop("POST", "/verify")
    upload = """
        def upload():
            return api.create_commit("ada/net", commit_message="Up", operations=[
                Add("w.bin", bytes(range(256)) * 400), Add("a.txt", b"a")])
    """
    out = client(upload + "    out['oid'] = upload().oid; out['waits'] = waits")
    assert out["waits"] == [1, 2, 8.0, 1, 2, 1]
    assert hub.commits("ada/net")[0].oid == out["oid"]
    assert hub.files("ada/net")["w.bin"] == WEIGHTS
    assert asked(hub, "POST", "/preupload/") == [503, 503, 200]
    assert asked(hub, "POST", "/batch") == [429, 200]
    assert asked(hub, "PUT") == [None, 500, 200]
    assert asked(hub, "POST", "/verify") == [None, 200]


def test_commits_that_fail_or_whose_answer_is_lost(hub, client):
    hub.create_repo("ada/net")
    hub.fail("POST", "/commit/")
    hub.drop("POST", "/commit/", after_handling=True)
    hub.fail("GET", "/api/models/ada/net$", status=502, after=1)
    hub.drop("GET", "/resolve/main/w.bin", bytes_sent=1000)
    out = client("""
        def upload():
            return api.create_commit("ada/net", commit_message="Up", operations=[
                Add("w.bin", bytes(range(256)) * 400), Add("a.txt", b"a")])
        out["first"], out["second"], out["third"] = outcome(upload), outcome(upload), upload().oid
        out["info"] = [outcome(lambda: api.model_info("ada/net").id) for _ in range(3)]
        out["read"] = pathlib.Path(hf.hf_hub_download("ada/net", "w.bin")).read_bytes() == bytes(range(256)) * 400
    """)
    assert out["first"] == ["HfHubHTTPError", 503]
    assert out["second"] == ["RemoteProtocolError", None]
    assert [commit.title for commit in hub.commits("ada/net")] == ["Up", "initial commit"]
    assert out["third"] == hub.commits("ada/net")[0].oid
    assert asked(hub, "POST", "/commit/") == [503, None]
    assert asked(hub, "PUT") == [200]
    assert out["info"] == ["ada/net", ["HfHubHTTPError", 502], "ada/net"]
    assert out["read"] is True
    assert len(asked(hub, "GET", "/resolve/main/w.bin")) == 2


def test_a_hub_that_stays_away_and_one_that_is_gone(hub):
    hub.create_repo("ada/net")
    hub.fail("GET", "/api/", times=None, status=500, headers={"X-More": "yes"})
    hub.drop("HEAD", "/ada/net/resolve/", times=None)
    for _ in range(3):
        status, headers, body = raw(hub, "GET", "/api/models/ada/net")
        assert (status, headers["X-More"], json.loads(body)) == (500, "yes", {"error": "Injected fault: 500"})
        with pytest.raises(http.client.RemoteDisconnected):
            raw(hub, "HEAD", "/ada/net/resolve/main/.gitattributes")
    hub.recover()
    kept = http.client.HTTPConnection(urllib.parse.urlsplit(hub.url).netloc, timeout=10)
    # Several requests on one connection, errors with unread bodies among them.
    for method, path, status in [
        ("HEAD", "/ada/net/resolve/main/.gitattributes", 200),
        ("POST", "/api/none", 404),
        ("HEAD", "/ada/net/resolve/main/none", 404),
        ("GET", "/api/models/ada/net", 200),
    ]:
        kept.request(method, path, b"x" * 100_000 if method == "POST" else b"")
        response = kept.getresponse()
        assert response.status == status
        assert (len(response.read()) > 0) == (method != "HEAD")
    hub.close()
    with pytest.raises((ConnectionError, http.client.BadStatusLine)):
        kept.request("GET", "/api/models/ada/net") or kept.getresponse()
    with pytest.raises(ConnectionRefusedError):
        raw(hub, "GET", "/api/models/ada/net")


def test_ranges_and_headers(hub):
    hub.create_repo("ada/net")
    oid = hub.seed("ada/net", {"w.bin": WEIGHTS, "dir/a b.txt": b"hello", "empty.bin": b""})
    lfs = {path for path, blob in hub.commits("ada/net")[0].files.items() if blob.lfs}
    assert lfs == {"w.bin"}
    path = "/ada/net/resolve/main/w.bin"
    size = len(WEIGHTS)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    status, headers, body = raw(hub, "HEAD", path)
    assert (status, body, headers["Content-Length"]) == (200, b"", str(size))
    assert (headers["ETag"], headers["X-Linked-Etag"]) == (f'"{sha256}"', f'"{sha256}"')
    assert (headers["X-Linked-Size"], headers["X-Repo-Commit"]) == (str(size), oid)
    assert headers["X-Request-Id"]
    for asked_range, first, last in [("100-", 100, size - 1), ("100-199", 100, 199), ("-50", size - 50, size - 1)]:
        status, headers, body = raw(hub, "GET", path, Range=f"bytes={asked_range}")
        assert (status, body) == (206, WEIGHTS[first : last + 1])
        assert headers["Content-Range"] == f"bytes {first}-{last}/{size}"
    assert raw(hub, "GET", path, Range=f"bytes={size}-")[0] == 416
    status, headers, body = raw(hub, "GET", f"/ada/net/resolve/{oid}/dir/a%20b.txt")
    assert (status, body, headers["ETag"]) == (200, b"hello", f'"{git_sha1(b"hello")}"')
    assert "X-Linked-Etag" not in headers
    status, headers, body = raw(hub, "GET", "/ada/net/resolve/main/none")
    assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", oid)
    status, headers, body = raw(hub, "GET", "/api/models/ada/net", token="hf_nobody")
    assert (status, headers["X-Error-Message"]) == (401, "Invalid credentials in Authorization header")
    for unknown in ("/api/telemetry/x", "/api/models/ada/net/xet-write-token/main"):
        status, headers, body = raw(hub, "GET", unknown)
        assert status == 404 and "Not found" in json.loads(body)["error"]


def test_a_bad_commit_changes_nothing(hub):
    hub.create_repo("ada/net")
    oid = hub.seed("ada/net", {"a.txt": b"a"})
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    header = {"key": "header", "value": {"summary": "Bad"}}
    file = {"key": "file", "value": {"path": "new.txt", "content": "YQ==", "encoding": "base64"}}
    lfs = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": sha256, "size": len(WEIGHTS)}}

    def commit(*lines):
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        status, headers, body = raw(hub, "POST", "/api/models/ada/net/commit/main", body, "hf_ada")
        return status, headers.get("X-Error-Code")

    def batch(size):
        body = json.dumps({"operation": "upload", "objects": [{"oid": sha256, "size": size}]}).encode()
        status, _, body = raw(hub, "POST", "/ada/net.git/info/lfs/objects/batch", body, "hf_ada")
        assert status == 200
        return json.loads(body)["objects"][0]

    def place(path):
        return {"key": "file", "value": {**file["value"], "path": path}}

    gone = {"key": "deletedFile", "value": {"path": "none"}}
    card = place("README.md")
    card["value"]["content"] = "LS0tCmxpY2Vuc2U6IG1pbmUKLS0tCg=="
    assert commit(header, file, lfs) == (400, None)
    assert commit(header, file, gone) == (404, "EntryNotFound")
    assert commit(file) == (400, None)
    assert commit(header, file, card) == (400, None)
    for path in ("../x", "/x", "a.txt/x", "b//c", ".git/config", ""):
        assert commit(header, file, place(path)) == (400, None), path
    href = batch(len(WEIGHTS))["actions"]["upload"]["href"].removeprefix(hub.url)
    assert raw(hub, "PUT", href, WEIGHTS[:-1])[0] == 400
    assert raw(hub, "PUT", href, WEIGHTS[:-1] + b"x")[0] == 400
    assert raw(hub, "PUT", href.split("?")[0], WEIGHTS)[0] == 403
    assert commit(header, file, lfs) == (400, None)
    head, created = hub.commits("ada/net")
    assert head.oid == oid and head.parent == created.oid
    assert raw(hub, "PUT", href, WEIGHTS)[0] == 200
    assert "actions" not in batch(len(WEIGHTS))
    assert commit(header, file, {"key": "lfsFile", "value": {**lfs["value"], "size": 3}}) == (400, None)
    assert commit(header, file, lfs) == (200, None)
    assert hub.commits("ada/net")[0].changed == ("new.txt", "w.bin")
