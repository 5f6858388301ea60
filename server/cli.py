"""The command `tokenmill`. Imports little by itself: engine processes start before FastAPI is read."""

from __future__ import annotations

import argparse
import contextlib
import errno
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import msgspec

from tokenmill.engine.config import DType, Quantization
from tokenmill.server.auth import read_keys
from tokenmill.server.config import BUILT_IN, MOST_RANKS, Config, Entry
from tokenmill.server.config_file import ConfigError, load_config
from tokenmill.server.console import Console
from tokenmill.server.descriptors import open_standard, raise_limit
from tokenmill.server.engine_process import ENGINE_COMMAND, EngineProcess
from tokenmill.server.logs import configure
from tokenmill.server.plan import make_plan, spawn_preloaded
from tokenmill.server.stop_signals import stop_signals
from tokenmill.server.version import VERSION

logger = logging.getLogger("tokenmill")

DEFAULT_CONFIG = Path("models.yaml")
SERVE_EPILOG = """\
environment:
  TOKENMILL_API_KEYS    the keys that clients must send, separated by commas; none: anyone may ask
  TOKENMILL_ADMIN_KEYS  the keys that may load and unload models; none: nobody may
  HF_HUB_OFFLINE=1      never ask the Hugging Face Hub
  HF_TOKEN              for models of the Hub that need an account

Chat templates, KV cache, aliases, limits and all else of a model stand in models.yaml.
To be reached from other machines: --host 0.0.0.0. Metrics: /metrics. API: /docs. Playground: /
"""


class StartError(Exception):
    """The server can't start. One line."""


def _settle_home() -> None:
    """Give a user id that the system doesn't know, as containers run under, the home that a login would: /."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"


def main(argv: Sequence[str] | None = None, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Run a sub-command; returns the exit code. Tests bring an `engine_command` of their own."""
    open_standard()
    _settle_home()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["tiny"]:
        from tokenmill.engine import tiny

        return tiny.main(arguments[1:]) or 0
    if arguments[:1] == ["bench"]:
        from tokenmill.bench import cli as bench

        return bench.main(arguments[1:]) or 0
    options = _parser().parse_args(arguments)
    try:
        return serve(options, engine_command)
    except (ConfigError, StartError) as error:
        print(f"tokenmill: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenmill",
        description="A local inference server for open-weight models.",
        epilog="tokenmill COMMAND --help tells what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"tokenmill {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve the models of models.yaml over HTTP",
        description="Serve the models of models.yaml, or one SOURCE, through an OpenAI-compatible API.",
        epilog=SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a models.yaml; default: ./models.yaml, or where there is none the packaged SmolLM2",
    )
    serve.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default 8000; 0 takes a free one)")
    source = serve.add_mutually_exclusive_group()
    source.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,  # else its absence would undo --model
        metavar="SOURCE",
        help="serve this Hub id, folder or .gguf instead of the file's models",
    )
    source.add_argument("--model", metavar="SOURCE", help="the same")
    serve.add_argument("--name", metavar="VENDOR/MODEL", help="the name that clients use for SOURCE")
    serve.add_argument(
        "--max-context", type=int, metavar="N", help="tokens of prompt and answer together, for all models"
    )
    serve.add_argument("--device", help="cpu, cuda:0, … for all models")
    serve.add_argument(
        "--dtype", choices=get_args(DType), help="number format of the weights, for all models"
    )
    serve.add_argument(
        "--quantization", choices=get_args(Quantization), help="how weights are held, for all models"
    )
    serve.add_argument("--tensor-parallel", type=int, metavar="N", help="GPUs that share each model")
    commands.add_parser("tiny", help="write a small random checkpoint, for tests", add_help=False)
    commands.add_parser("bench", help="measure throughput and latency", add_help=False)
    return parser


def serve(options: argparse.Namespace, engine_command: Sequence[str]) -> int:
    """`tokenmill serve`: listen, start the engines, then read the web framework and serve until a signal."""
    processes: dict[str, EngineProcess] = {}
    with called_off(processes):
        try:
            return _serve(options, engine_command, processes)
        finally:
            for process in processes.values():
                process.kill()


def _serve(
    options: argparse.Namespace, engine_command: Sequence[str], processes: dict[str, EngineProcess]
) -> int:
    begun = time.monotonic()
    raise_limit()
    config = make_config(options)
    listener = listen(config.server.host, config.server.port)
    keys, admin_keys = read_keys(config.server.api_keys_env), read_keys(config.server.admin_keys_env)
    if set(keys) & set(admin_keys):
        raise StartError(
            f"{config.server.api_keys_env} and {config.server.admin_keys_env} share a key; "
            "an API key must not be an admin key"
        )
    configure(secrets=(*keys, *admin_keys))
    address = listener.getsockname()
    url = _url(config.server.host, address[1])
    plan = make_plan(config)
    processes.update(_spawn(config, engine_command))
    logger.info("starting on %s with %s", url, ", ".join(plan.engines))
    if not keys and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        how = f"; {config.server.api_keys_env} sets some" if config.server.api_keys_env else ""
        logger.warning("no API key is asked for: whoever reaches %s may use it%s", url, how)
    console = Console(url, begun, with_key=bool(keys))
    return _run(config, (keys, admin_keys), listener, console, processes, engine_command)


@contextlib.contextmanager
def called_off(processes: Mapping[str, EngineProcess]) -> Iterator[None]:
    """Within it, whatever asks the process to end does so at once, and ends these processes with it.

    No exception does: it would be raised anywhere, and what is not Python's own (pydantic's core, callbacks of the
    event loop) turns such a one into another or drops it. A server that runs takes the signals itself
    (`lifecycle.py`).
    """

    def end(number: int, frame: object) -> None:
        for process in processes.values():
            process.kill()
        logging.shutdown()
        os._exit(0)

    before = {number: signal.signal(number, end) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_config(options: argparse.Namespace) -> Config:
    """The configuration of a command line. Raises `ConfigError` or `StartError`."""
    if options.config is not None:
        config = load_config(options.config)
    elif DEFAULT_CONFIG.exists():
        config = load_config(DEFAULT_CONFIG)
    else:
        config = BUILT_IN
    if options.name is not None and options.model is None:
        raise StartError("--name needs a SOURCE")
    if options.model == "":
        raise StartError("SOURCE must name a Hub id, a folder or a .gguf file")
    if options.model is not None:
        name = options.name or _name_of(options.model)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
            raise StartError(f"--name must be vendor/model_name, not {name!r}")
        config = msgspec.structs.replace(config, models={name: Entry(source=options.model)})
    if options.tensor_parallel is not None and not 1 <= options.tensor_parallel <= MOST_RANKS:
        raise StartError(f"--tensor-parallel must be from 1 to {MOST_RANKS}, not {options.tensor_parallel}")
    if options.max_context is not None and options.max_context < 1:
        raise StartError(f"--max-context must be at least 1, not {options.max_context}")
    given = {
        "max_context": options.max_context,
        "device": options.device,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "tensor_parallel": options.tensor_parallel,
    }
    given = {key: value for key, value in given.items() if value is not None}
    models = {name: msgspec.structs.replace(entry, **given) for name, entry in config.models.items()}
    address = {"host": options.host, "port": options.port}
    address = {key: value for key, value in address.items() if value is not None}
    if not 0 <= address.get("port", 0) <= 65535:
        raise StartError(f"--port must be from 0 to 65535, not {options.port}")
    return msgspec.structs.replace(
        config, models=models, server=msgspec.structs.replace(config.server, **address)
    )


def _name_of(source: str) -> str:
    """A name for a source that came without one: a Hub id's own in lower case, else local/FILE."""
    if (
        re.fullmatch(r"[\w.-]+/[\w.-]+", source, re.ASCII)
        and not source.startswith(".")
        and not Path(source).exists()
    ):
        return source.lower()
    stem = re.sub(r"[^\w.-]+", "-", Path(source).resolve().name.removesuffix(".gguf"), flags=re.ASCII)
    return f"local/{stem.lower() or 'model'}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that early clients wait instead of being refused. Raises `StartError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        option = "port" if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise StartError(f"can't listen on {host}:{port}: {reason}; choose another {_way(option)}") from None
    return listener


def _way(option: str) -> str:
    """How whoever started this sets an option: `make serve` has names of its own for it."""
    by_make = f" (make serve {option.upper()}=…)" if "MAKELEVEL" in os.environ else ""
    return f"{option} with --{option}{by_make}"


def _url(host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _spawn(config: Config, engine_command: Sequence[str]) -> dict[str, EngineProcess]:
    try:
        return spawn_preloaded(make_plan(config), engine_command)
    except OSError as error:
        raise StartError(f"can't start an engine process: {error}") from None


def _run(
    config: Config,
    keys: tuple[Sequence[str], Sequence[str]],
    listener: socket.socket,
    console: Console,
    processes: dict[str, EngineProcess],
    engine_command: Sequence[str],
) -> int:
    # Read only now: these take longer than all before, and the engines load meanwhile.
    import uvloop

    from tokenmill.server.app import create_app
    from tokenmill.server.lifecycle import Lifecycle
    from tokenmill.server.registry import Registry

    async def run() -> int:
        registry = Registry(config, command=engine_command, processes=processes, progress=console.report)
        app = create_app(registry, config.server, *keys)
        _, admin_keys = keys
        on_demand = bool(admin_keys) or any(entry.load == "lazy" for entry in config.models.values())
        return await Lifecycle(app, registry, config.server.drain_s, on_demand).run(listener)

    return uvloop.run(run())


if __name__ == "__main__":
    sys.exit(main())
