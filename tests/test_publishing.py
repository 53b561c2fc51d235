"""Publishing on a Hub on this machine (hub_server.py), by the real clients in processes of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_client import Client
from hub_jobs import LABELS, SIZE
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import ConvNet

from hf_kd import create_student, publish_student, save_student
from hf_kd.card_edits import BEGIN, END
from hf_kd.hub import PublishingError


ROOT = Path(__file__).parents[1]
ADA, BOB, READER = "hf_ada", "hf_bob", "hf_reader"
COMMIT, PUT = r"/commit/", r"^/(lfs|.*lfs.*)"


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        server.add_user("ada", ADA, orgs=["lab"])
        server.add_user("bob", BOB)
        server.add_user("reader", READER, orgs=["lab"], can_write=False)
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(hub.variables(), tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.fixture(autouse=True)
def no_faults(hub):
    yield
    hub.recover()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved student, with provenance that names a path of this machine."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    save_student(create_student("test_resnet", label_names=LABELS, img_size=SIZE), folder)
    provenance = {
        "teacher": {"id": str(folder / "big-teacher"), "top1": 0.9}, "loss": "wttm", "gamma": 0.5, "temperature": 2.0,
        "beta": 1.0, "ce_weight": 1.0, "student": {"architecture": "test_resnet", "num_classes": 5},
    }  # fmt: skip
    (folder / "distillation.json").write_text(json.dumps(provenance))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(saved, tmp_path / "owl")


names = (f"owl{number}" for number in range(1000))


@pytest.fixture
def repo_id():
    """A name that no other test uses."""
    return f"ada/{next(names)}"


@pytest.fixture
def publish(client, folder, repo_id):
    def call(**options):
        return client.call(
            "publish", **{"folder": str(folder), "repo_id": repo_id, "license": "mit", "as_user": ADA, **options}
        )

    return call


def commits(hub, repo_id, revision="main"):
    """Titles, newest first, without the one that every repository begins with."""
    return [commit.title for commit in hub.commits(repo_id, revision)][:-1]


def exists(hub, repo_id):
    return any(name == repo_id for _, name, _ in hub.repos())


# ---- What is published ---------------------------------------------------------------------------------------------


FILES = {".gitattributes", "README.md", "config.json", "distillation.json", "model.safetensors"}


def test_a_saved_student_in_one_commit(hub, publish, repo_id, folder):
    published = publish(commit_message="The owl", dataset="owner/animals", metrics={"top1": 0.875})["result"]
    assert commits(hub, repo_id) == ["The owl"]
    assert published["commit"] == hub.commits(repo_id)[0].oid
    assert published["url"].endswith(f"{repo_id}/commit/{published['commit']}")
    files = hub.files(repo_id)
    assert files.keys() == FILES | {".eval_results/owner__animals.yaml"}
    assert {name: len(content) for name, content in files.items() if name != ".gitattributes"} == published["files"]
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    assert f'timm.create_model("hf-hub:{repo_id}", pretrained=True)' in card.text
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("owner/animals", "accuracy", 0.875)
    assert yaml.safe_load(files[".eval_results/owner__animals.yaml"]) == [
        {"dataset": {"id": "owner/animals", "task_id": "default"}, "value": 87.5, "notes": "Top-1 in %"}
    ]


def test_what_was_published_again_makes_no_commit(hub, publish, repo_id):
    first, second = publish()["result"], publish()["result"]
    assert len(commits(hub, repo_id)) == 1
    assert second["commit"] == first["commit"]


def test_neither_pickles_nor_checkpoints_nor_paths_leave_the_machine(hub, publish, folder, repo_id):
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "notes.txt",
    ):
        (folder / name).write_bytes(b"secret")
    shutil.copytree(folder, folder / "checkpoint-7")
    (folder / "teacher.safetensors").write_bytes(b"secret")
    published = publish()["result"]
    assert hub.files(repo_id).keys() == FILES
    assert published["left_out"] == [
        "checkpoint-7/", "notes.txt", "optimizer.pt", "rng_state.pth", "scheduler.pt", "teacher.safetensors",
        "trainer_state.json", "training_args.bin",
    ]  # fmt: skip
    for name, content in hub.files(repo_id).items():
        assert str(folder.parent).encode() not in content, name
        assert b"secret" not in content, name
    assert json.loads(hub.files(repo_id)["distillation.json"])["teacher"]["id"] == "big-teacher"


def test_what_contradicts_the_student_goes(hub, publish, repo_id):
    hub.create_repo(repo_id)
    before = {
        "distillation.json": b"{}", "model.safetensors": b"old", "pytorch_model.bin": b"old",
        "training_args.bin": b"x", "preprocessor_config.json": b"{}", "model-00001-of-00002.safetensors": b"old",
        "notes.md": b"mine", "LICENSE": b"mine", "last-checkpoint/model.safetensors": b"old",
    }  # fmt: skip
    hub.seed(repo_id, before)
    publish()
    assert len(commits(hub, repo_id)) == 2
    assert hub.files(repo_id).keys() == FILES | {"notes.md", "LICENSE", "last-checkpoint/model.safetensors"}


def test_a_branch_is_made(hub, publish, repo_id):
    publish(revision="v1")
    assert commits(hub, repo_id, "v1") == ["Publish the student"]
    assert commits(hub, repo_id) == []


def test_a_pull_request_leaves_main_alone(hub, publish, repo_id):
    published = publish(create_pr=True)["result"]
    assert published["url"].endswith("/discussions/1")
    assert hub.files(repo_id, "refs/pr/1").keys() == FILES
    assert hub.files(repo_id).keys() == {".gitattributes"}
    assert "cannot be given with `create_pr`" in publish(create_pr=True, revision="v1")["error"][1]


def test_private(hub, publish, repo_id):
    publish(private=True)
    assert ("model", repo_id, True) in hub.repos()


def test_a_name_alone_goes_to_the_user(hub, publish):
    name = next(names)
    assert publish(repo_id=name)["result"]["repo_id"] == f"ada/{name}"
    assert f'"hf-hub:ada/{name}"' in hub.files(f"ada/{name}")["README.md"].decode()


def test_what_arrives_otherwise_than_it_was_sent_is_told(hub, publish, repo_id):
    hub.spoil("model.safetensors", b"x" * 100)
    hub.spoil("config.json", b"{}")
    kind, message = publish()["error"]
    assert kind == "PublishingError"
    assert message == (
        f"What was published to {repo_id} as commit {hub.commits(repo_id)[0].oid} is not what was sent: config.json, "
        "model.safetensors read back otherwise. Publish again."
    )
    hub.recover()
    publish()
    assert len(hub.files(repo_id)["model.safetensors"]) > 1_000_000


def test_reading_back_finds_what_differs(publish, client, folder, repo_id):
    commit = publish()["result"]["commit"]
    job = {"folder": str(folder), "repo_id": repo_id, "commit": commit, "as_user": ADA}
    assert client.call("differences", **job)["result"] == ["distillation.json"]  # its path was cut down
    (folder / "model.safetensors").write_bytes(b"other")
    (folder / "new.json").write_text("{}")
    assert client.call("differences", **job)["result"] == ["distillation.json", "model.safetensors", "new.json"]


def test_a_network_is_published_as_it_is_saved(hub, client, repo_id, tmp_path):
    torch.manual_seed(0)
    network = create_student("test_resnet", label_names=LABELS)
    with Client({**hub.variables()}, tmp_path) as other:  # a network does not travel as JSON
        other.start("train", output_dir=str(tmp_path / "out"), kind="timm", as_user=ADA, num_train_epochs=1,
                    card={"license": "mit"}, hub_model_id=repo_id)  # fmt: skip
        assert other.result()["result"]["publication"]["repo_id"] == repo_id
    publication = publish_student(network, repo_id, license="mit", dry_run=True)
    assert publication.files["model.safetensors"] > 1_000_000
    assert publication.files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert "LABEL_0" not in publication.card


# ---- The card ------------------------------------------------------------------------------------------------------


def test_a_missing_licence_is_an_error_that_says_so(hub, publish, repo_id):
    kind, message = publish(license=None)["error"]
    assert kind == "ValueError"
    assert 'such as license="apache-2.0"' in message
    assert "none can be inherited" in message
    assert not exists(hub, repo_id)


def test_the_licence_of_the_data_or_of_the_first_weights_is_inherited(publish, folder):
    card = publish(license=None, dataset_license="cc-by-4.0")["result"]["card"]
    assert ModelCard(card).data.license == "cc-by-4.0"
    assert "`cc-by-4.0`, inherited from the data set." in card
    provenance = json.loads((folder / "distillation.json").read_text())
    provenance["student"]["base_model"] = {"id": "timm/test_resnet.r160_in1k", "license": "apache-2.0"}
    (folder / "distillation.json").write_text(json.dumps(provenance))
    card = publish(license=None)["result"]["card"]
    assert ModelCard(card).data.to_dict()["base_model"] == "timm/test_resnet.r160_in1k"
    assert "`apache-2.0`, inherited from the weights that the student started from." in card


def test_the_hubs_validator_has_the_last_word(hub, publish, repo_id):
    kind, message = publish(license="my-own-licence")["error"]
    assert kind == "PublishingError"
    assert message.startswith(f"Nothing was published to {repo_id}: ")
    assert "license" in message
    assert "\n" not in message
    assert commits(hub, repo_id) == []


def edited(text):
    return text.replace("license: mit", "license: mit\nthumbnail: owl.png").replace(BEGIN, f"Mine.\n\n{BEGIN}")


def test_a_card_edited_on_the_hub_keeps_the_edits(hub, publish, repo_id):
    publish()
    hub.seed(repo_id, {"README.md": edited(hub.files(repo_id)["README.md"].decode()).encode()})
    publish(metrics={"top1": 0.5}, dataset="owner/animals")
    card = ModelCard(hub.files(repo_id)["README.md"].decode())
    assert card.text.strip().startswith(f"Mine.\n\n{BEGIN}\n# owl")
    assert card.data.to_dict()["thumbnail"] == "owl.png"
    assert card.data.datasets == ["owner/animals"]
    assert "| these weights | 50.00 |" in card.text


def test_a_card_edited_in_the_folder_goes_up(hub, publish, repo_id, folder):
    card = publish()["result"]["card"]
    (folder / "README.md").write_text(edited(card))
    answer = publish(metrics={"top1": 0.5})
    assert answer["log"] == []
    text = hub.files(repo_id)["README.md"].decode()
    assert text.count("Mine.") == 1
    assert "thumbnail: owl.png" in text
    assert "50.00" in text


def test_of_two_edited_cards_the_folders_goes_up_and_the_other_is_told_of(hub, publish, repo_id, folder):
    card = publish()["result"]["card"]
    hub.seed(repo_id, {"README.md": card.replace(END, f"{END}\nTheirs.").encode()})
    (folder / "README.md").write_text(edited(card))
    answer = publish()
    assert "edited by hand on the Hub and in the folder" in answer["log"][0]
    text = hub.files(repo_id)["README.md"].decode()
    assert "Mine." in text
    assert "Theirs." not in text


def test_somebodys_own_card_is_left_alone(hub, publish, repo_id):
    hub.create_repo(repo_id)
    hub.seed(repo_id, {"README.md": b"---\nlicense: mit\n---\nAll my own words.\n"})
    answer = publish()
    assert "left as it is" in answer["log"][0]
    assert hub.files(repo_id)["README.md"] == b"---\nlicense: mit\n---\nAll my own words.\n"


def test_a_card_of_metadata_alone_gets_its_text(hub, publish, repo_id):
    hub.create_repo(repo_id)
    hub.seed(repo_id, {"README.md": b"---\nlicense: mit\nlanguage: en\n---\n"})
    publish(license="apache-2.0")
    card = ModelCard(hub.files(repo_id)["README.md"].decode())
    assert card.data.to_dict()["language"] == "en"
    assert card.data.license == "apache-2.0"
    assert BEGIN in card.text


def test_a_network_that_must_be_registered_first(hub, client, repo_id, tmp_path):
    import own_network  # noqa: F401

    save_student(create_student("owl_net", num_classes=3), tmp_path / "owl")
    answer = client.call("publish", folder=str(tmp_path / "owl"), repo_id=repo_id, license="mit", as_user=ADA)
    assert answer["result"]["card"].count("import own_network  # registers") == 2
    kind, message = client.call("try_load", name=f"hf-hub:{repo_id}", as_user=ADA)["error"]
    assert (kind, "`import own_network` registers it" in message) == ("RuntimeError", True)


# ---- What cannot be published --------------------------------------------------------------------------------------


def test_folders_without_a_student(tmp_path):
    def message(folder, repo_id="ada/owl", **options):
        with pytest.raises(ValueError, match=".") as caught:
            publish_student(folder, repo_id, license="mit", dry_run=True, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "none")
    assert "holds no model.safetensors (no weights)" in message(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "only pytorch_model.bin, and pickles are not published" in message(tmp_path)
    save_student(create_student("test_resnet", num_classes=3), tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is no JSON object" in message(tmp_path)
    assert "is no name for a repository" in message(tmp_path, "a/b/c")
    assert "is no name for a repository" in message(tmp_path, "ada/an owl")
    assert "`label_names` are for a network" in message(tmp_path, label_names=["a"])


def test_networks_that_other_libraries_saved_are_mended(hub, client, publish, tmp_path, repo_id):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=5).eval()
    pixels = torch.rand(2, 3, SIZE, SIZE)
    expected = {"pixels": pixels, "logits": network(pixels).detach()}
    timm.models.save_for_hf(network, tmp_path / "by_timm", model_args={"num_classes": 5}, safe_serialization=True)
    from safetensors.torch import save_file
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    wrapped = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=5)).eval()
    wrapped.timm_model.load_state_dict(network.state_dict())
    wrapped.save_pretrained(tmp_path / "by_transformers")
    save_file(expected, tmp_path / "expected")
    for name in ("by_timm", "by_transformers"):
        publish(folder=str(tmp_path / name), repo_id=f"{repo_id}-{name}")
        found = client.call("open_everywhere", repo_id=f"{repo_id}-{name}", expected=str(tmp_path / "expected"))
        assert max(found["result"]["differences"].values()) < 1e-5, name
        assert found["result"]["labels"]["transformers"] == [f"LABEL_{number}" for number in range(5)]


# ---- Failures ------------------------------------------------------------------------------------------------------


def refused(answer, repo_id):
    kind, message = answer["error"]
    assert kind == "PublishingError"
    assert message.startswith(f"Nothing was published to {repo_id}: ")
    assert "\n" not in message
    return message


def test_no_token(publish, repo_id, hub):
    before = len(hub.requests)
    assert "there is no token" in refused(publish(as_user=None), repo_id)
    assert len(hub.requests) == before


def test_a_token_that_is_wrong(publish, repo_id):
    message = refused(publish(as_user="hf_wrong"), repo_id)
    assert "401" in message
    assert "Log in with `hf auth login`" in message


def test_no_right_to_write(publish, hub):
    for user, repo_id in ((READER, "lab/owl"), (BOB, "ada/of-ada")):
        if not exists(hub, repo_id):
            hub.create_repo(repo_id)
        message = refused(publish(as_user=user, repo_id=repo_id), repo_id)
        assert "no right to write there, or the name is somebody else's" in message
        assert commits(hub, repo_id) == []
    refused(publish(as_user=BOB, repo_id="ada/new"), "ada/new")
    assert not exists(hub, "ada/new")


def test_a_name_that_holds_somebodys_weights(publish, hub, repo_id):
    hub.create_repo(repo_id)
    hub.seed(repo_id, {"pytorch_model.bin": b"precious", "config.json": b"{}"})
    assert "holds weights that hf_kd did not publish" in refused(publish(), repo_id)
    assert hub.files(repo_id)["pytorch_model.bin"] == b"precious"
    assert len(commits(hub, repo_id)) == 1
    publish(overwrite=True)
    assert hub.files(repo_id).keys() == FILES


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_recovers(publish, hub, repo_id, status):
    hub.fail("POST", COMMIT, status=status, times=2)
    hub.fail("POST", "/api/repos/create", status=status, times=1)
    answer = publish()
    assert answer["result"]["commit"] == hub.commits(repo_id)[0].oid
    assert len(commits(hub, repo_id)) == 1
    assert [f"the Hub answered {status}" in line for line in answer["log"]] == [True] * 3


def test_a_server_that_does_not_recover(publish, hub, repo_id, folder):
    hub.fail("POST", COMMIT, status=503, times=None)
    message = refused(publish(), repo_id)
    assert "the Hub answered 503" in message
    assert "It was tried 5 times." in message
    assert commits(hub, repo_id) == []
    hub.recover()
    before = len(hub.requests)
    publish()
    assert hub.files(repo_id).keys() == FILES
    # What had been uploaded is not sent again.
    assert [request.path for request in hub.requests[before:] if request.method == "PUT"] == []


def test_a_commit_that_cannot_be_read_back_is_not_called_nothing(publish, hub, repo_id):
    hub.fail("POST", "/paths-info/", status=503, times=None)
    kind, message = publish()["error"]
    commit = hub.commits(repo_id)[0].oid
    assert kind == "PublishingError"
    assert message.startswith(
        f"Commit {commit} was made in {repo_id}, but could not be read back: the Hub answered 503"
    )
    assert len(commits(hub, repo_id)) == 1


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_asks_for_time_gets_it(publish, hub, form):
    after = (
        "1" if form == "seconds" else format_datetime(datetime.now(timezone.utc) + timedelta(seconds=4), usegmt=True)
    )
    hub.fail("POST", COMMIT, status=429, headers={"Retry-After": after})
    start = time.monotonic()
    answer = publish()
    assert time.monotonic() - start > 1
    assert f"tried again in {'1 s' if form == 'seconds' else ''}" in answer["log"][0]
    assert answer["result"]["commit"]


def test_a_network_that_goes_down_in_the_middle(publish, hub, repo_id):
    hub.drop("PUT", "", bytes_read=100_000)
    assert publish()["result"]["commit"] == hub.commits(repo_id)[0].oid
    other = f"{repo_id}-down"
    hub.drop("POST", COMMIT, times=None)
    message = refused(publish(repo_id=other), other)
    assert "cannot be reached" in message
    assert "tried 5 times" in message
    assert commits(hub, other) == []


def test_a_lost_answer_does_not_make_a_second_commit(publish, hub, repo_id):
    hub.drop("POST", COMMIT, after_handling=True)
    answer = publish()
    assert len(commits(hub, repo_id)) == 1
    assert answer["result"]["commit"] == hub.commits(repo_id)[0].oid
    # A second pull request cannot be told from the first one, so there it is reported.
    hub.drop("POST", COMMIT, after_handling=True)
    assert "cannot be reached" in refused(publish(create_pr=True, license="apache-2.0"), repo_id)
    assert set(hub.refs(repo_id)) >= {"refs/pr/1"}
    assert "refs/pr/2" not in hub.refs(repo_id)


def test_a_commit_that_comes_between_is_not_lost(publish, hub, repo_id, folder, client):
    publish()
    hub.fail("POST", COMMIT, status=412)
    publish(license="apache-2.0")
    assert ModelCard(hub.files(repo_id)["README.md"].decode()).data.license == "apache-2.0"
    assert len(commits(hub, repo_id)) == 2
    # And in earnest: while the client waits to send its weights again, somebody edits the card.
    (folder / "model.safetensors").write_bytes(hub.files(repo_id)["model.safetensors"] + b" " * 64)
    hub.drop("PUT", "/lfs/", bytes_read=1000)
    before = len(hub.requests)
    client.start("publish", folder=str(folder), repo_id=repo_id, license="mit", as_user=ADA, waits=[0.01] * 4)
    deadline = time.monotonic() + 60
    while not any(r.method == "PUT" for r in hub.requests[before:]) and time.monotonic() < deadline:
        time.sleep(0.02)
    hub.seed(repo_id, {"README.md": edited(hub.files(repo_id)["README.md"].decode()).encode()})
    assert client.result()["result"]["commit"] == hub.commits(repo_id)[0].oid
    card = ModelCard(hub.files(repo_id)["README.md"].decode())
    assert "Mine." in card.text
    assert card.data.license == "mit"


def test_a_push_that_is_killed_can_be_repeated(hub, folder, repo_id, tmp_path, publish):
    hub.fail("POST", COMMIT, status=503, times=None)
    with Client(hub.variables(), tmp_path) as doomed:
        doomed.start("publish", folder=str(folder), repo_id=repo_id, license="mit", as_user=ADA, waits=[60])
        deadline = time.monotonic() + 60
        while (
            not any("/commit/" in r.path and repo_id in r.path for r in hub.requests) and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        doomed.process.kill()
    hub.recover()
    assert commits(hub, repo_id) == []
    publish()
    assert hub.files(repo_id).keys() == FILES
    assert len(commits(hub, repo_id)) == 1


# ---- Training and pushing ------------------------------------------------------------------------------------------


def test_training_does_not_die_for_a_hub_that_fails(hub, client, tmp_path, repo_id):
    hub.fail("POST", ".", status=503, times=None)
    output = tmp_path / "out"
    settings = {"push_to_hub": True, "hub_model_id": repo_id, "hub_license": "mit", "hub_strategy": "every_save",
                "save_strategy": "epoch"}  # fmt: skip
    answer = client.call("train", output_dir=str(output), as_user=ADA, **settings)["result"]
    assert answer["steps"] == 6
    assert answer["publication"] is None
    assert len(answer["failures"]) >= 3
    assert all(failure.startswith(f"Nothing was published to {repo_id}") for failure in answer["failures"])
    assert answer["failures"][-1].endswith(f"publish it later with `hf-kd publish {output} {repo_id}`.")
    assert (output / "model.safetensors").is_file()
    assert not (output / ".push").exists()
    hub.recover()
    status, said, errors = client.call("command", arguments=["publish", str(output), repo_id], as_user=ADA)["result"]
    assert (status, errors) == (0, "")
    assert f"/{repo_id}/commit/{hub.commits(repo_id)[0].oid}" in said
    card = ModelCard(hub.files(repo_id)["README.md"].decode())
    # The card of the run, with its results and its schedule.
    assert "| these weights |" in card.text
    assert "2 epochs (6 steps)" in card.text
    assert "figures/curves.png" in hub.files(repo_id)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy(hub, client, tmp_path, repo_id, strategy):
    settings = {"push_to_hub": True, "hub_model_id": repo_id, "hub_license": "mit", "hub_strategy": strategy,
                "save_strategy": "epoch", "save_total_limit": 1, "hub_always_push": True}  # fmt: skip
    answer = client.call("train", output_dir=str(tmp_path / "out"), as_user=ADA, **settings)["result"]
    assert answer["failures"] == []
    during = ["Training in progress, epoch 2", "Training in progress, epoch 1"]
    # Nothing has changed between the last epoch and the end but with strategy "end".
    assert commits(hub, repo_id) == (["End of training"] if strategy == "end" else during)
    files = hub.files(repo_id)
    run = FILES | {"training_args.json", "figures/curves.png"}
    student = {"model.safetensors", "config.json", "distillation.json"}
    extra = {
        "checkpoint": {f"last-checkpoint/{name}" for name in student},
        "all_checkpoints": {f"checkpoint-{step}/{name}" for name in student for step in (3, 6)},
    }.get(strategy, set())
    assert files.keys() == run | extra
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert json.loads(files["distillation.json"])["global_step"] == 6
    if strategy == "all_checkpoints":
        assert json.loads(files["checkpoint-3/distillation.json"])["global_step"] == 3
    text = b"".join(content for name, content in files.items() if name.endswith((".json", ".md")))
    assert str(tmp_path).encode() not in text
    assert b"hf_" not in text.replace(b"hf_kd", b"")


def test_the_token_given_in_the_arguments_is_used_and_not_published(hub, client, tmp_path, repo_id):
    settings = {"hub_token": ADA, "hub_model_id": repo_id, "hub_license": "mit", "num_train_epochs": 1}
    answer = client.call("train", output_dir=str(tmp_path / "out"), **settings)["result"]
    assert answer["failures"] == []
    assert commits(hub, repo_id) == ["End of training"]
    for name, content in hub.files(repo_id).items():
        assert ADA.encode() not in content, name


def test_a_missing_licence_is_told_before_training(client, tmp_path, repo_id, hub):
    answer = client.call("train", output_dir=str(tmp_path), as_user=ADA, push_to_hub=True, hub_model_id=repo_id)
    assert answer["error"][0] == "ValueError"
    assert "give `hub_license`" in answer["error"][1]


def test_teachers_from_the_hub_are_pinned(hub, client, tmp_path, repo_id, publish):
    commit = publish()["result"]["commit"]
    publish(license="apache-2.0")
    newer = hub.commits(repo_id)[0].oid
    job = {"output_dir": str(tmp_path), "num_train_epochs": 1, "hub_model_id": f"{repo_id}-student", "as_user": ADA}
    for name, revision, loaded in (
        # First, so that its commit can be in the cache only if that is what transformers loaded.
        (repo_id, commit, commit),
        (f"hf-hub:{repo_id}", None, newer),
        (f"hf-hub:{repo_id}", commit, commit),
        (f"hf-hub:{repo_id}@{commit}", None, commit),
    ):
        answer = client.call("train", teacher=name, teacher_revision=revision, card={"license": "mit"}, **job)[
            "result"
        ]
        published = hub.files(f"{repo_id}-student")
        teacher = json.loads(published["distillation.json"])["teacher"]
        assert (teacher["hub_id"], teacher["revision"]) == (repo_id, loaded), name
        card = ModelCard(answer["publication"]["card"])
        assert card.data.to_dict()["teacher_model"] == [repo_id]
        assert (
            f"](https://huggingface.co/{repo_id}), " in card.text
            or f"](https://huggingface.co/{repo_id}) at" in card.text
        )
        assert f"at revision `{loaded}`" in card.text


def test_offline_training_says_that_nothing_was_pushed(hub, tmp_path):
    before = len(hub.requests)
    with Client(hub.variables(), tmp_path, HF_HUB_OFFLINE="1") as offline:
        answer = offline.call(
            "train", output_dir=str(tmp_path / "out"), as_user=ADA, push_to_hub=True, hub_model_id="ada/offline",
            hub_license="mit",
        )  # fmt: skip
    assert answer["result"]["steps"] == 6
    assert "HF_HUB_OFFLINE is set" in answer["result"]["failures"][-1]
    assert any("Nothing was published to ada/offline" in line for line in answer["log"])
    assert len(hub.requests) == before


# ---- The command ---------------------------------------------------------------------------------------------------


def test_dry_run_lists_files_and_card_and_asks_nothing_of_the_hub(hub, client, folder, repo_id):
    before = len(hub.requests)
    arguments = ["publish", str(folder), repo_id, "--license", "mit", "--dry_run"]
    status, said, errors = client.call("command", arguments=arguments)["result"]
    assert (status, errors) == (0, "")
    size = (folder / "model.safetensors").stat().st_size
    assert f"{size:,} bytes  model.safetensors" in said
    assert f"# {repo_id.split('/')[1]}" in said
    assert "license: mit" in said
    assert "Nothing was published (--dry_run)." in said
    assert len(hub.requests) == before


def test_the_commands_mistakes(client, folder, tmp_path):
    def run(*arguments, **options):
        return client.call("command", arguments=["publish", *arguments], **options)["result"]

    status, _, errors = run(str(folder), "ada/owl")
    assert (status, errors.count("\n")) == (2, 1)
    assert "--license" in errors
    status, _, errors = run(str(folder), "ada/owl", "--license", "mit")
    assert (status, errors.count("\n")) == (1, 1)
    assert "there is no token" in errors
    assert run(str(tmp_path / "none"), "ada/owl")[0] == 2
    assert run(str(folder))[0] == 2


# ---- The whole way -------------------------------------------------------------------------------------------------


def check_opened(found, labels, timm_opens=True):
    assert max(found["differences"].values()) < 1e-5
    assert found["differences"].keys() == {"transformers", "teacher", *(["timm"] if timm_opens else [])}
    assert all(names == labels for names in found["labels"].values())
    views, images = list(found["views"].values()), list(found["images"].values())
    assert len(images) == 4 if timm_opens else 3
    for view, image in zip([*views, views[0]], images, strict=False):
        assert view[0] == views[0][0]
        assert view[1:] == pytest.approx(views[0][1:], abs=1e-3)
        assert image[0] == images[0][0]
        assert image[1] == pytest.approx(images[0][1], abs=1e-3)


@pytest.fixture(scope="module")
def fresh(hub, tmp_path_factory):
    """A stranger: another process, with an empty cache and no token."""
    with Client(hub.variables(), tmp_path_factory.mktemp("stranger")) as process:
        yield process


@pytest.mark.parametrize("kind", ["student", "timm", "vit", "mobilenet"])
def test_a_stranger_opens_the_student(hub, client, fresh, tmp_path, kind):
    repo_id = f"ada/open-{kind}"
    card = {"license": "apache-2.0", "dataset": "owner/animals", "results": {"without distillation": {"top1": 0.5}}}
    answer = client.call("train", output_dir=str(tmp_path), kind=kind, hub_model_id=repo_id, card=card, as_user=ADA)
    assert answer["result"]["publication"]["commit"] == hub.commits(repo_id)[0].oid
    timm_opens = kind in ("student", "timm")
    expected = str(tmp_path / "expected.safetensors")
    found = fresh.call("open_everywhere", repo_id=repo_id, expected=expected, timm_opens=timm_opens)["result"]
    check_opened(found, LABELS, timm_opens)
    assert (found["hub_id"], found["revision"]) == (repo_id, hub.commits(repo_id)[0].oid)
    printed = fresh.call("run_card", repo_id=repo_id)["result"]
    assert len(printed) == (2 if timm_opens else 1)
    assert all(words[0] == found["images"]["transformers"][0] for words in printed)
    card = ModelCard(hub.files(repo_id)["README.md"].decode())
    assert card.data.library_name == ("timm" if timm_opens else "transformers")
    assert "| without distillation | 50.00 |" in card.text


def test_the_lines_of_the_readme(hub, client, fresh, tmp_path, publish, repo_id):
    section = re.search(r"## Publishing\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    push, opening = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    publish()
    lines = [line for line in opening.replace("you/resnet18-wttm", repo_id).splitlines() if line]
    names = ["import timm", "from transformers import AutoModelForImageClassification, pipeline",
             "from hf_kd import Teacher"]  # fmt: skip
    made = fresh.call("run_code", code=lines, names=names)["result"]
    assert made == ["ResNet", "TimmWrapperForImageClassification", "ImageClassificationPipeline", "Teacher"]
    (command,) = re.findall(r"```bash\nhf-kd (.*?)  #", section)
    out = shutil.copytree(tmp_path / "owl", tmp_path / "out" / "final")
    arguments = command.replace("out/final", str(out)).replace("you/resnet18-wttm", f"{repo_id}-2").split()
    status, _, errors = client.call("command", arguments=arguments, as_user=ADA)["result"]
    assert (status, errors) == (0, "")
    (call,) = [line.split("#")[0].strip() for line in push.splitlines() if line.startswith("publish_student")]
    call = call.replace("out/final", str(out)).replace("you/resnet18-wttm", f"{repo_id}-3")
    made = client.call("run_code", code=[call], names=["from hf_kd import publish_student"], as_user=ADA)["result"]
    assert made == ["Publication"]
    assert hub.files(f"{repo_id}-2").keys() == hub.files(f"{repo_id}-3").keys() == FILES


def test_weights_alone(hub, client, tmp_path, repo_id):
    save_student(ConvNet(), tmp_path)
    answer = client.call("publish", folder=str(tmp_path), repo_id=repo_id, license="mit", as_user=ADA)["result"]
    assert hub.files(repo_id).keys() == {".gitattributes", "README.md", "model.safetensors"}
    assert "build the network in your own code" in answer["card"]


def test_two_processes_train_on_digits_and_push_once(hub, fresh, tmp_path):
    """`accelerate launch` on two processes, two epochs on real digits, and a stranger who opens what they pushed."""
    environment = {
        **os.environ, **hub.variables(), "HF_TOKEN": ADA, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    launch_file = ROOT / "recipes" / "configs" / "accelerate" / "two_cpu.yaml"
    before = len(hub.requests)
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_file),
         str(ROOT / "tests" / "publish_digits.py"), str(tmp_path / "out"), "ada/digits"],
        env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    posted = [request.path for request in hub.requests[before:] if request.method == "POST"]
    assert len([path for path in posted if "/commit/" in path]) == 1
    assert commits(hub, "ada/digits") == ["End of training"]
    found = fresh.call(
        "open_everywhere", repo_id="ada/digits", expected=str(tmp_path / "out" / "expected.safetensors")
    )["result"]
    check_opened(found, [str(digit) for digit in range(10)])
    assert load_file(tmp_path / "out" / "expected.safetensors")["logits"].shape == (8, 10)
    card = ModelCard(hub.files("ada/digits")["README.md"].decode())
    assert "on each of 2 processes" in card.text


def test_publishing_error_is_one_of_the_public_names():
    assert issubclass(PublishingError, RuntimeError)
