"""``mambaint generate``: continue texts with a language model, as the tokens come."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mamba_int.datasets import Tokenizer
    from mamba_int.generation import Generation
    from mamba_int.graph import Graph
    from mamba_int.text_stream import TextStream


def _load(model: Path | None, tokenizer_file: Path | None) -> tuple[Graph, Tokenizer]:
    """The graph that is meant, made from its checkpoint if need be, and what its tokens mean."""
    from mamba_int.datasets import find_tokenizer
    from mamba_int.errors import MambaintError
    from mamba_int.graph import Graph
    from quantize.latest import resolve_either

    path = resolve_either(model)
    held: Tokenizer | None = None
    if path.suffix == ".safetensors":
        from mamba_int.training import load_checkpoint
        from quantize.native import native_graph

        checkpoint = load_checkpoint(path)
        graph, held = native_graph(checkpoint), checkpoint.data.tokenizer
    else:
        graph = Graph.load(path)
    if graph.input.integer("features"):
        raise MambaintError(f"{path} reads features, not tokens", "give a language model")
    if held is not None and tokenizer_file is None:
        return graph, held
    return graph, find_tokenizer(graph.input.integer("high") + 1, path.parent, tokenizer_file)


class _Printer:
    """Shows the texts one after the other: the first that has not ended streams, later ones wait."""

    def __init__(self, prompts: list[bytes], streams: list[TextStream]) -> None:
        self.prompts, self.streams = prompts, streams
        self.current, self.shown = 0, 0
        self.ended = [False] * len(streams)
        # What a model invents must not steer the terminal.
        harmless = "\n\t"
        controls = [code for code in (*range(32), *range(127, 160)) if chr(code) not in harmless]
        self.safe = dict.fromkeys(controls, "\N{REPLACEMENT CHARACTER}") if sys.stdout.isatty() else {}
        self._title()

    def _title(self) -> None:
        if len(self.streams) > 1:
            click.echo(
                f"[{self.current + 1}] {json.dumps(self.prompts[self.current][:60].decode(errors='replace'))}"
            )

    def show(self) -> None:
        """Bring the terminal up to date."""
        while True:
            text = self.streams[self.current].text
            click.echo(text[self.shown :].translate(self.safe), nl=False)
            self.shown = len(text)
            if not self.ended[self.current]:
                return
            click.echo()
            if self.current + 1 == len(self.streams):
                return
            self.current, self.shown = self.current + 1, 0
            self._title()


def _results(
    prompts: list[bytes], prompt_tokens: list[int], streams: list[TextStream], generation: Generation
) -> list[dict[str, Any]]:
    """What became of each prompt, as JSON values."""
    rows = zip(prompts, prompt_tokens, streams, generation.tokens, generation.stopped, strict=True)
    return [
        {
            "prompt": prompt.decode(errors="replace"),
            "prompt_tokens": count,
            "text": stream.text,
            "tokens": tokens,
            "finish": "stop" if stopped else "length",
        }
        for prompt, count, stream, tokens, stopped in rows
    ]


@click.command("generate")
@click.argument("model", metavar="[MODEL]", required=False, type=click.Path(path_type=Path))
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; several are one batch.")
@click.option(
    "--prompt-file",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A file that is a prompt; several are one batch.",
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Most new tokens."
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Divides the logits.")
@click.option("--top-k", type=click.IntRange(min=1), help="Only the K likeliest tokens.")
@click.option("--top-p", type=float, help="Only the likeliest tokens that have this probability together.")
@click.option("--greedy", is_flag=True, help="Always the likeliest token.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random choices."
)
@click.option(
    "--tokenizer-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A tokenizer.json [default: the checkpoint's own, or the one beside the model, else bytes].",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, at the end.")
def command(
    model: Path | None,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    greedy: bool,
    stops: tuple[str, ...],
    seed: int,
    tokenizer_file: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Continue prompts with a language model, token by token, in constant memory.

    MODEL is a quantized model, a checkpoint, or the folder of either [default: quantized last]. Every token
    comes from the same integers as the model's whole run. The same seed gives the same text on any device;
    prompt number i has random numbers of its own, whatever the others are.

    \b
    Example:
      mambaint generate runs/char --prompt "Call me" --temperature 0.8 --top-p 0.95
    """
    import torch

    from mamba_int.decoder import Decoder
    from mamba_int.device import resolve_device
    from mamba_int.errors import MambaintError
    from mamba_int.files import read_bytes
    from mamba_int.generation import generate
    from mamba_int.sampling import Sampler, SamplingConfig
    from mamba_int.text_stream import TextStream

    torch.set_num_threads(1)
    prompts = [text.encode() for text in texts] + [read_bytes(path) for path in files]
    if not prompts:
        raise MambaintError("there is nothing to continue", "give --prompt TEXT or --prompt-file FILE")
    config = SamplingConfig(0.0 if greedy else temperature, top_k or 0, 1.0 if top_p is None else top_p, seed)
    chosen = resolve_device(device)
    graph, tokenizer = _load(model, tokenizer_file)
    streams = [TextStream(tokenizer, stops) for _ in prompts]
    special = {token for text, token in tokenizer.special_tokens.items() if text in stops}
    encoded = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    decoder = Decoder(graph, len(prompts), chosen, cuda_graph=chosen.type == "cuda")
    printer = None if as_json else _Printer(prompts, streams)

    def on_token(row: int, token: int) -> bool:
        streams[row].feed(token)
        if printer is not None:
            printer.ended[row] = streams[row].stopped
            printer.show()
        return streams[row].stopped

    sampler = Sampler(graph, config, len(prompts), chosen)
    result = generate(decoder, encoded, sampler, max_tokens, special, on_token)
    for stream in streams:
        stream.feed(None)
    if printer is not None:
        printer.ended = [True] * len(streams)
        printer.show()
        return
    found = _results(prompts, [len(ids) for ids in encoded], streams, result)
    report: dict[str, Any] = {
        "model_id": graph.model_id,
        "results": found,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "prefill_seconds": round(result.prefill_seconds, 4),
        "decode_seconds": round(result.decode_seconds, 4),
        "state_bytes": decoder.state.nbytes,
        "state_bytes_per_sequence": decoder.state.nbytes // len(prompts),
        "device": str(chosen),
        "seed": seed,
    }
    click.echo(json.dumps(report, indent=2))
