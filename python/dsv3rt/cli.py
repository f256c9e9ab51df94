"""The command line: `dsv3rt train CONFIG.toml [--section.key value ...]` and `dsv3rt doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from dsv3rt.errors import BackendUnavailableError

if TYPE_CHECKING:
    from dsv3rt.train.trainer import Trainer

_USER_ERROR = 2
_INTERRUPTED = 130
_SAMPLE_TEMPERATURE, _SAMPLE_TOP_P = 0.8, 0.9


class _Parser(argparse.ArgumentParser):
    """argparse, its errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. What the user can mend is one line on stderr and exit code 2."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except OSError as error:
        what = error.strerror or str(error)
        message = f"{error.filename}: {what}" if error.filename else what
    except (ValueError, FloatingPointError, BackendUnavailableError) as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\ndsv3rt: interrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
        return _INTERRUPTED
    print(f"dsv3rt: error: {' '.join(message.split())}", file=sys.stderr)
    return _USER_ERROR


def _run(argv: list[str]) -> int:
    arguments, overrides = _split_overrides(argv)
    options = _parser().parse_args(arguments)
    if overrides and options.command != "train":
        raise ValueError(f"--{overrides[0][0]}: {options.command} takes no configuration keys")
    if options.command == "doctor":
        return _doctor()
    return _train(options.config, overrides)


def _train(config_path: str, overrides: list[tuple[str, str]]) -> int:
    from dsv3rt.train.config_file import load

    config = load(config_path, overrides)
    from torch import OutOfMemoryError

    from dsv3rt.train.trainer import Trainer  # slow to import: only for a configuration that is right

    try:
        trainer = Trainer(config)
        if trainer.fit():
            _print_completions(trainer)
    except OutOfMemoryError as error:
        raise ValueError(f"out of GPU memory; lower train.micro_batch_size or the model ({error})") from None
    return 0


def _print_completions(trainer: Trainer) -> None:
    """Let the trained model continue `train.sample_prompts`."""
    from dsv3rt.infer.generate import generate

    run, tokenizer = trainer.config.train, trainer.tokenizer
    completions = generate(
        trainer.engine.model,
        trainer.prompts,
        max_new_tokens=run.sample_tokens,
        temperature=_SAMPLE_TEMPERATURE,
        top_p=_SAMPLE_TOP_P,
        seed=run.seed,
        eos=tokenizer.eos,
    )
    for prompt, tokens in zip(run.sample_prompts, completions, strict=True):
        text = tokenizer.decode([token for token in tokens if token != tokenizer.eos])
        print(f"\n--- completion of {prompt!r}\n{prompt}{text.rstrip()}")


def _doctor() -> int:
    from dsv3rt import doctor

    return doctor.main([])


def _split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The arguments proper, and every `--key value` or `--key=value` that is not an option of argparse's."""
    arguments: list[str] = []
    overrides: list[tuple[str, str]] = []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith("--") or argument in ("--help", "--version", "--"):
            arguments.append(argument)
            continue
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            following = next(rest, None)
            if following is None:
                raise ValueError(f"--{key}: needs a value")
            value = following
        overrides.append((key, value))
    return arguments, overrides


def _parser() -> argparse.ArgumentParser:
    from dsv3rt import __version__

    parser = _Parser(prog="dsv3rt", description="The DeepSeek-V3 system: train, and look after the installation.")
    parser.add_argument("--version", action="version", version=f"dsv3rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train a model, or go on with a run that stopped",
        description="Train a model as CONFIG.toml says. A run that stopped goes on from its newest checkpoint.",
        epilog="Any key of the configuration can be given, its value as in TOML: --train.steps 100 --optim.lr=1e-3",
        usage="dsv3rt train CONFIG.toml [--section.key value ...]",
    )
    train.add_argument("config", metavar="CONFIG.toml", help="sections: model parallel train data optim checkpoint")
    commands.add_parser("doctor", help="say what this installation can do, and what it lacks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
