"""A cache that goes through the Hub (hub_server.py) and comes back on another machine."""

import json
import shutil

import pytest
import torch
from cached_runs import Fixed, Views, assert_same_run, run
from hub_client import Client
from hub_server import HubServer

from hf_kd import TeacherCache, create_student, save_student


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        server.add_user("ada", "hf_ada")
        server.add_user("reader", "hf_reader", can_write=False)
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(hub.variables(), tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.mark.parametrize("dtype", ["fp16", "int8", "fp32"])
def test_a_published_cache_is_the_same_cache_to_the_last_bit(dtype, hub, client, tmp_path):
    first = run(tmp_path / "first", tmp_path / "cache", teacher_cache_dtype=dtype, num_train_epochs=2)
    answer = client.call("push_cache", folder=str(tmp_path / "cache"), repo_id=f"ada/{dtype}", as_user="hf_ada")
    assert f"ada/{dtype}" in answer["result"]
    files = hub.files(f"ada/{dtype}", type="dataset")
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "data/view-00000-0000.parquet",
        "data/view-00001-0000.parquet",
        "manifest.json",
    ]
    assert str(tmp_path) not in files["manifest.json"].decode() + files["README.md"].decode()
    answer = client.call("fetch_cache", repo_id=f"ada/{dtype}", folder=str(tmp_path / "fetched"), as_user="hf_ada")
    kept = {"fp16": ["distance", "top"], "int8": ["distance", "top", "step"], "fp32": ["logits"]}[dtype]
    assert answer["result"] == {"views": [0, 1], "dtype": dtype, "columns": ["view", "index", *kept], "rows": 54}
    one, other = TeacherCache(tmp_path / "cache"), TeacherCache(tmp_path / "fetched")
    for view in range(2):
        rows, present = other.read(view, torch.arange(27))
        assert present.all() and torch.equal(rows, one.read(view, torch.arange(27))[0])
    later = run(tmp_path / "later", tmp_path / "fetched", num_train_epochs=2)
    assert later.teacher.model.seen == 0
    assert_same_run(first, later)


def test_pushing_again_replaces_what_was_there(hub, client, tmp_path):
    run(tmp_path / "1", tmp_path / "many", data=Views(count=9), num_train_epochs=2)
    run(tmp_path / "2", tmp_path / "one", data=Fixed(count=9))
    for name in ("many", "one"):
        client.call("push_cache", folder=str(tmp_path / name), repo_id="ada/again", as_user="hf_ada")
    assert [name for name in hub.files("ada/again", type="dataset") if name.startswith("data/")] == [
        "data/view-00000-0000.parquet"
    ]


def test_damaged_rows_are_not_published(hub, client, tmp_path):
    run(tmp_path / "1", tmp_path / "cache", data=Fixed(count=9))
    with open(tmp_path / "cache" / "rows-00000.bin", "r+b") as file:
        file.write(b"\xff\xff")
    client.call("push_cache", folder=str(tmp_path / "cache"), repo_id="ada/damaged", as_user="hf_ada")
    answer = client.call("fetch_cache", repo_id="ada/damaged", folder=str(tmp_path / "fetched"), as_user="hf_ada")
    assert answer["result"]["rows"] == 8
    again = run(tmp_path / "2", tmp_path / "fetched", data=Fixed(count=9))
    assert again.teacher.model.seen == 1


def test_what_goes_wrong_is_one_sentence(client, tmp_path):
    def told(job, **arguments):
        return client.call(job, **arguments)["error"]

    run(tmp_path / "1", tmp_path / "cache", data=Fixed(count=9))
    folder = str(tmp_path / "cache")
    kind, message = told("push_cache", folder=folder, repo_id="ada/x")
    assert kind == "PublishingError" and "there is no token for the Hub" in message
    kind, message = told("push_cache", folder=folder, repo_id="ada/x", as_user="hf_reader")
    assert kind == "PublishingError" and "The token has no right to write there" in message
    kind, message = told("push_cache", folder=folder, repo_id="no spaces please", as_user="hf_ada")
    assert kind == "ValueError" and "is no name for a repository" in message
    TeacherCache(tmp_path / "empty", num_classes=3, samples=4)
    kind, message = told("push_cache", folder=str(tmp_path / "empty"), repo_id="ada/x", as_user="hf_ada")
    assert kind == "ValueError" and "has no rows to publish: fill it first" in message
    kind, message = told("fetch_cache", repo_id="ada/nothing", folder=str(tmp_path / "new"), as_user="hf_ada")
    assert kind == "RuntimeError" and "The teacher cache ada/nothing could not be fetched from the Hub" in message
    assert not (tmp_path / "new").exists()
    kind, message = told("fetch_cache", repo_id="ada/nothing", folder=folder, as_user="hf_ada")
    assert kind == "ValueError" and "There is a teacher cache in" in message
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["shards"] == [0]
    shutil.rmtree(folder)


def test_a_teacher_on_the_hub_is_known_by_its_commit(client, tmp_path):
    torch.manual_seed(0)
    save_student(create_student("test_resnet", num_classes=5, img_size=32), tmp_path / "teacher")
    published = {"folder": str(tmp_path / "teacher"), "repo_id": "ada/owl", "license": "mit", "as_user": "hf_ada"}
    assert client.call("publish", **published)["result"]["commit"]
    first, later = client.call("train_with_cache", teacher="hf-hub:ada/owl", folder=str(tmp_path))["result"]
    assert first == [True, later[1]] and later[0] is False
    source = TeacherCache(tmp_path / "cache").fingerprint["teacher"]["source"]
    assert source["hub_id"] == "ada/owl" and len(source["commit"]) == 40
