"""``mambaint tokenize``: text files to a token file that training reads without loading it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click

from cli.terminal import live_console

_STAGES = {"train": "training the tokenizer", "encode": "tokenizing"}


@contextmanager
def _progress_bar(to_stderr: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A live bar where there is a terminal to draw it on; otherwise nothing."""
    console = live_console(to_stderr)
    if console is None:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=_STAGES[stage], completed=done, total=total)

        yield show


@click.command("tokenize")
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.tokens",
    help="The token file to write.",
)
@click.option(
    "--tokenizer",
    type=click.Choice(["bytes", "bpe"]),
    help="Bytes, or byte-level byte-pair encoding [default: bpe].",
)
@click.option(
    "--vocab-size", type=int, metavar="N", help="Tokens of the BPE trained on the text [default: 4096]."
)
@click.option(
    "--tokenizer-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Use the BPE of a tokenizer.json, or of another token file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    texts: tuple[Path, ...],
    output: Path,
    tokenizer: Literal["bytes", "bpe"] | None,
    vocab_size: int | None,
    tokenizer_file: Path | None,
    as_json: bool,
) -> None:
    """Tokenize text files into one token file, which may exceed the memory.

    \b
      mambaint tokenize book.txt --output book.tokens --vocab-size 4096
      mambaint train --data book.tokens

    The first 85 % train (and train the tokenizer), the next 5 % validate, the last 10 % test.
    """
    from mamba_int.datasets import write_token_file
    from mamba_int.errors import MambaintError

    if output.suffix != ".tokens":
        raise MambaintError(f"--output {output} does not end in .tokens", "name it FILE.tokens")
    if vocab_size is not None and (tokenizer_file is not None or tokenizer == "bytes"):
        raise MambaintError("--vocab-size is for a BPE that is trained here", "leave it out")
    if tokenizer_file is not None and tokenizer == "bytes":
        raise MambaintError("--tokenizer-file is for a BPE", "leave it or --tokenizer bytes out")
    with _progress_bar(as_json) as report:
        size = 4096 if vocab_size is None else vocab_size
        written = write_token_file(texts, output, tokenizer or "bpe", size, tokenizer_file, report)
    tokens, size = sum(written.tokens.values()), sum(written.bytes.values())
    result = {
        "output": str(written.path),
        "vocab_size": written.vocab_size,
        "tokens": written.tokens,
        "bytes": written.bytes,
        "bytes_per_token": round(size / tokens, 4),
        "tokenizer_sha256": written.tokenizer_sha256,
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    shares = ", ".join(f"{name} {count:,}" for name, count in written.tokens.items())
    click.echo(f"tokens      {tokens:,} ({shares})")
    click.echo(f"text        {size:,} bytes, {size / tokens:.2f} a token")
    click.echo(f"vocabulary  {written.vocab_size:,}")
    click.echo(f"written     {written.path}")
