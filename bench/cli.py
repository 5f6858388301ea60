"""The command line `tokenmill bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tokenmill.bench import latency, report, serve, throughput
from tokenmill.bench.options import BenchError
from tokenmill.engine.load_error import LoadError

COMMANDS = {
    "throughput": (throughput, "tokens a second in this process, by batch size; prefill and decode apart"),
    "latency": (latency, "one request at a time in this process: first token, the next ones, percentiles"),
    "serve": (serve, "OpenAI-compatible servers over HTTP, several of them in turn"),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="tokenmill bench",
        description="Measures what the machine can do at most, then what was reached.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"Measures {summary}.")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status. What can't be measured is told in one line."""
    args = build_parser().parse_args(argv)
    try:
        report.check_arguments(args)
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("\nInterrupted", file=sys.stderr)
        return 130
    except (BenchError, LoadError, MemoryError, OSError, ValueError) as error:
        print(f"tokenmill bench: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
