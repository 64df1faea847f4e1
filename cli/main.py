"""The ``mambaint`` command: finds the subcommand, loads only its module, and turns faults into one line.

Exit codes: 0 success; 2 bad usage, bad input or anything that could not be done.
``mambaint verify`` and ``open`` alone use 1: the proof was checked and does not show what it should.
"""

from __future__ import annotations

import importlib
import sys

import click

from mamba_int.errors import MambaintError

COMMANDS = {
    "tokenize": "cli.tokenize",
    "train": "cli.train",
    "quantize": "cli.quantize",
    "inspect": "cli.inspect",
    "run": "cli.run",
    "eval": "cli.eval",
    "generate": "cli.generate",
    "estimate": "cli.estimate",
    "setup": "cli.setup",
    "prove": "cli.prove",
    "verify": "cli.verify",
    "open": "cli.open",
    "demo": "cli.demo",
}


class LazyGroup(click.Group):
    """A click group that imports a subcommand's module only when that subcommand is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mambaint", prog_name="mambaint")
def mambaint() -> None:
    """Train, quantize and prove integer-only Mamba models.

    \b
    The main path:
      mambaint train --preset digits
      mambaint quantize
      mambaint prove --input x.json
      mambaint verify proof.json
    """


def main() -> None:
    """Console entry point: run the command; report a fault as one line and exit 2."""
    try:
        code = mambaint(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("mambaint: interrupted; nothing half-written was left", err=True)
        sys.exit(2)
    except MambaintError as error:
        click.echo(f"mambaint: {error.cause}; {error.remedy}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
