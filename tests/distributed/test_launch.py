"""Launch configurations as users launch them, and launches that are not what they look like."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from launch_files import CONFIGS, read
from processes import free_port, run_processes
from safetensors.torch import load_file
from tiny import config, networks

from hf_kd import DistillationTrainer
from hf_kd.launch import check_launch, launched_processes, runs_on_cpus


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "imagenet_wttm.py"
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
SIZE = 32
# No BatchNorm, whose statistics are those of one process's batch.
STUDENT = {"student": "test_vit", "student_kwargs": json.dumps({"embed_dim": 16, "num_heads": 2, "depth": 1})}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The tests' own process was started by no launcher."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "MASTER_")) or name in COUNTS:
            monkeypatch.delenv(name)


# ---- The files -----------------------------------------------------------------------------------------------------

FILES = {
    "cpu": ("NO", 1, "no", "simple"),
    "two_cpu": ("MULTI_GPU", 2, "no", "multi_gpu"),
    "one_machine": ("MULTI_GPU", 8, "bf16", "multi_gpu"),
    "several_machines": ("MULTI_GPU", 16, "bf16", "multi_gpu"),
    "fsdp2": ("FSDP", 8, "bf16", "use_fsdp"),
    "deepspeed_zero2": ("DEEPSPEED", 8, "no", "use_deepspeed"),
}


def test_every_file_is_known_here():
    assert {path.stem for path in CONFIGS.iterdir()} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    engine, processes, precision, launcher = FILES[name]
    loaded = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (loaded.distributed_type.value, loaded.num_processes) == (engine, processes)
    args, _, _ = read(name)
    assert args.mixed_precision == precision
    assert [kind for kind in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(args, kind)] == (
        [] if launcher == "simple" else [launcher]
    )
    # What a user changes for the machine at hand is changed on the command line.
    assert read(name, "--num_processes", "4")[0].num_processes == 4


def test_several_machines_are_told_apart_on_the_command_line():
    args, _, _ = read("several_machines", "--machine_rank", "1", "--main_process_ip", "10.1.2.3")
    assert (args.num_machines, args.machine_rank, args.rdzv_backend) == (2, 1, "static")
    assert (args.main_process_ip, args.main_process_port) == ("10.1.2.3", 29500)


# ---- Launches that work --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launch(bright_and_dark, small_teacher):
    """Starts `accelerate launch` with the ImageNet recipe on these pictures; its result is `communicate`d."""
    running = []

    def start(output_dir, *options):
        arguments = {
            "output_dir": output_dir, "train_dir": bright_and_dark / "train",
            "val_dir": bright_and_dark / "val", "teacher": small_teacher,
            "img_size": SIZE, "total_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.1,
            "lr_milestones": 1, "dataloader_num_workers": 0, "eval_strategy": "no", "save_strategy": "no",
            "teacher_preflight": False, "disable_tqdm": True, **STUDENT,
        }  # fmt: skip
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(RECIPE)]
        command += [f"--{name}={value}" for name, value in arguments.items()]
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def configured(name):
    return ("--config_file", str(CONFIGS / f"{name}.yaml"))


def finished(process, folder):
    """results.json and the student's weights of a run that succeeded."""
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return json.loads((folder / "results.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def one_process(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "out"
    results, weights = finished(launch(folder, *configured("cpu")), folder)
    assert (results["training"]["processes"], results["training"]["steps_done"]) == (1, 8)
    return weights


def assert_same(results, weights, expected):
    assert (results["training"]["processes"], results["training"]["steps_done"]) == (2, 8)
    assert results["training"]["per_device_train_batch_size"] == 2
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def test_two_processes_give_the_student_of_one(launch, one_process, tmp_path):
    folder = tmp_path / "out"
    results, weights = finished(launch(folder, *configured("two_cpu")), folder)
    assert_same(results, weights, one_process)
    # The comparison means something: timm's bias begins at zero.
    assert weights["head.bias"].abs().max() > 0.01


@pytest.mark.slow
def test_two_machines_give_the_student_of_one(launch, one_process, tmp_path):
    folder = tmp_path / "out"
    meeting = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    machines = [launch(folder, *configured("two_cpu"), *meeting, "--machine_rank", str(rank)) for rank in (0, 1)]
    results, weights = finished(machines[0], folder)
    _, error = machines[1].communicate(timeout=60)
    assert machines[1].returncode == 0, error
    assert_same(results, weights, one_process)


# ---- Launches that do not ------------------------------------------------------------------------------------------


def refused(process, folder):
    """The one sentence in which a launch ended."""
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not folder.exists()
    (sentence,) = [line for line in error.splitlines() if "imagenet_wttm.py: error: " in line]
    return sentence.partition("error: ")[2]


def test_several_processes_of_which_one_starts(launch, tmp_path):
    sentence = refused(launch(tmp_path / "out", "--cpu", "--num_processes", "2"), tmp_path / "out")
    assert sentence == (
        "`accelerate launch` was asked for several processes and has started one, as it does for CPUs without MPI: "
        "start two, on CPUs too, by `accelerate launch --multi_gpu --num_processes 2 SCRIPT.py`; or, if one process "
        "is what you want, ask for --num_processes 1 and --num_machines 1, without MASTER_ADDR and MASTER_PORT in the "
        "environment."
    )


def test_fsdp_without_gpus(launch, tmp_path):
    process = launch(tmp_path / "out", *configured("fsdp2"), "--num_processes", "2")
    assert refused(process, tmp_path / "out") == (
        "FSDP was asked for and is not running (DDP in 2 processes is), since Accelerate shards on GPUs alone: there, "
        "start the script with `accelerate launch --config_file FSDP2.yaml SCRIPT.py` and without use_cpu; on CPUs "
        "train with DDP, by `accelerate launch --multi_gpu --num_processes 2 SCRIPT.py`."
    )


def refusal(rank, variables, folder):
    """The message with which a launch with these variables is refused."""
    args = config(folder)
    # Not before: transformers wants DeepSpeed to be installed for it.
    os.environ.update(variables)
    with pytest.raises(RuntimeError) as raised:
        check_launch(args)
    return str(raised.value)


def test_deepspeed_without_gpus(tmp_path):
    args, defaults, _ = read("deepspeed_zero2", "--num_processes", "2")
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(args)
    variables = {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}
    assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    sentence = (
        "DeepSpeed was asked for and is not running (DDP in 2 processes is), since Accelerate leaves it out on CPUs: "
        "on GPUs, start the script with `accelerate launch --config_file DEEPSPEED.yaml SCRIPT.py` and without "
        "use_cpu; on CPUs train with DDP, by `accelerate launch --multi_gpu --num_processes 2 SCRIPT.py`."
    )
    assert run_processes(refusal, 2, variables, tmp_path) == [sentence, sentence]


# ---- What the launcher says ----------------------------------------------------------------------------------------


def test_a_plain_run_is_none_of_these(tmp_path):
    assert launched_processes() == 1
    check_launch(config(tmp_path))


@pytest.mark.parametrize("name", COUNTS)
def test_processes_that_do_not_find_together(name, tmp_path, monkeypatch):
    args = config(tmp_path)
    monkeypatch.setenv(name, "1")
    check_launch(args)
    monkeypatch.setenv(name, "3")
    assert launched_processes() == 3
    with pytest.raises(RuntimeError) as raised:
        check_launch(args)
    assert str(raised.value) == (
        f"The launcher started 3 processes ({name}) and 1 found together, so that each would train alone, into the "
        "same folder: start them by `accelerate launch --multi_gpu --num_processes 3 SCRIPT.py`, on CPUs too "
        "(--num_machines as well, if there are several); or, if one process is what you want, start it without "
        f"{name} in the environment."
    )


def test_the_trainer_looks_at_its_launch(tmp_path, monkeypatch):
    args = config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="The launcher started 2 processes .WORLD_SIZE. and 1 found together"):
        DistillationTrainer(*networks(), args)


@pytest.mark.parametrize("missing", ["ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"])
def test_one_process_where_one_was_asked_for(missing, tmp_path, monkeypatch):
    """A cluster's shell may hold a meeting point, and `accelerate launch` may start one process: both are right."""
    traces = {"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "10.0.0.1"}
    for name, value in {**traces, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="asked for several processes and has started one"):
        check_launch(config(tmp_path))
    monkeypatch.delenv(missing)
    check_launch(config(tmp_path))


def test_fsdp_by_argument_needs_a_launcher_too(tmp_path):
    with pytest.raises(RuntimeError, match="FSDP was asked for and is not running .training in one process is."):
        check_launch(config(tmp_path, fsdp=True))


def test_deepspeed_that_is_yet_to_start(tmp_path, monkeypatch):
    """Without a launcher DeepSpeed starts when the trainer makes its accelerator, unless the CPU is asked for."""
    on_cpu, elsewhere = config(tmp_path), config(tmp_path, use_cpu=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_launch(elsewhere)
    with pytest.raises(RuntimeError, match="DeepSpeed was asked for and is not running .training in one process is."):
        check_launch(on_cpu)


@pytest.mark.parametrize(
    ("processes", "accelerator", "expected"),
    [(1, None, False), (2, None, True), (2, "mps", True), (2, "cuda", False)],
)
def test_where_several_processes_run(processes, accelerator, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    device = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    assert runs_on_cpus() is expected


def world_without_use_cpu(rank, folder):
    args = config(folder, use_cpu=False)
    return args.use_cpu, args.world_size, args.process_index


def test_processes_without_gpus_find_each_other_without_use_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_processes(world_without_use_cpu, 2, tmp_path) == [(True, 2, 0), (True, 2, 1)]
