"""The command line of the trainer: `python -m ring_jax.train --help`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from .mesh import default_cpu_devices, quiet_cuda_plugin, request_cpu_devices
from .training import TrainConfig, load_config, train

COMMAND = "python -m ring_jax.train"


def parse_args(args: Sequence[str]) -> TrainConfig:
    """The options on the command line; with `--resume`, what is not given there is as in the run that it resumes.

    Wrong syntax ends the program with a message, as in any command; wrong values are left to `TrainConfig.check`.
    """
    config = _parse(args, TrainConfig())
    if config.resume is None:
        return config
    if not config.resume and config.out is None:
        raise ValueError("--resume needs the folder of the run: --resume RUN, or --resume with --out RUN")
    run = config.resume or str(config.out)
    if config.out is not None and Path(run) != config.out:
        raise ValueError(f"--resume {run} goes on in that folder: leave --out {config.out} away")
    resumed = _parse(args, load_config(Path(run, "config.json")))
    return dataclasses.replace(resumed, resume=run)


def main(args: Sequence[str] | None = None) -> int:
    """Trains; returns the exit status: 0, 2 for the user's mistakes, 128 + N after signal N."""
    try:
        config = parse_args(sys.argv[1:] if args is None else args)
        config.check()
        quiet_cuda_plugin()
        request_cpu_devices(config.cpu_devices or default_cpu_devices(config.mesh))
        result = train(config, Console())
    except (ValueError, NotImplementedError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; what was on disk before is still there", file=sys.stderr)
        return 130
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _parse(args: Sequence[str], default: TrainConfig) -> TrainConfig:
    return tyro.cli(tyro.conf.OmitArgPrefixes[TrainConfig], prog=COMMAND, args=args, default=default)


if __name__ == "__main__":
    sys.exit(main())
