"""The launch configurations, as `accelerate launch` reads them."""

from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs" / "accelerate"


def read(name, *options):
    """What `accelerate launch` makes of a file: its arguments, the file's defaults, and the precision."""
    arguments = ["--config_file", str(CONFIGS / f"{name}.yaml"), *options, "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(arguments))
