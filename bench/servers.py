"""The servers that `tokenmill bench serve` measures: options, names and models, and a first greeting."""

from __future__ import annotations

import argparse
import os
from typing import TypeVar

import msgspec

from tokenmill.bench.http_client import Client
from tokenmill.bench.load import Target, request_body
from tokenmill.bench.options import BenchError, json_object
from tokenmill.bench.workload import Workload

WARM_UP = 2
Value = TypeVar("Value")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the functions here read."""
    group = parser.add_argument_group("servers")
    group.add_argument("--base-url", action="append", required=True, metavar="URL", help="may be given again")
    group.add_argument("--name", action="append", metavar="NAME", help="of each server, in the same order")
    group.add_argument(
        "--model", action="append", metavar="NAME", help="one, or one a server (default: its first model)"
    )
    group.add_argument("--path", default="/v1/completions", help="or /v1/chat/completions")
    group.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds a bearer token")
    group.add_argument(
        "--extra-body",
        action="append",
        metavar="JSON",
        help="more fields of each request, one, or one a server; null takes one of ours away",
    )
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for each request")


async def open_targets(args: argparse.Namespace) -> list[Target]:
    """The servers with their names and models. Raises `BenchError` or OSError for those that don't answer."""
    urls: list[str] = args.base_url
    names: list[str] = args.name or urls
    if len(names) != len(urls):
        raise BenchError(f"{len(urls)} servers and {len(names)} names: one each, please")
    if len(set(names)) != len(names):
        raise BenchError("two servers of one name: tell them apart with --name")
    models = _one_each("--model", args.model or [None], len(urls))
    extras = _one_each(
        "--extra-body", [json_object("--extra-body", text) for text in args.extra_body or ["{}"]], len(urls)
    )
    headers = _authorization(args.api_key_env)
    targets = []
    for name, url, model, extra in zip(names, urls, models, extras, strict=True):
        client = Client(url, headers, args.timeout)
        targets.append(Target(name, client, args.path, model or await _first_model(client), extra))
    return targets


def _one_each(option: str, values: list[Value], count: int) -> list[Value]:
    """One value for all servers, or one for each."""
    if len(values) not in (1, count):
        raise BenchError(
            f"{option} was given {len(values)} times for {count} servers: once, or once for each"
        )
    return values * count if len(values) == 1 else values


async def warm_up(target: Target, work: Workload) -> None:
    """A few small requests that nobody counts. Raises `BenchError` with the first one's fault."""
    small = Workload(prompt_tokens=16, output_tokens=4, form=work.form)
    for job in small.jobs(WARM_UP, seed=-1):
        reply = await target.client.stream(target.path, request_body(target, job))
        if reply.error is not None:
            raise BenchError(f"{target.name}: {reply.error}")


async def _first_model(client: Client) -> str:
    try:
        listed = msgspec.json.decode(await client.get("/v1/models"))
        return str(listed["data"][0]["id"])
    except (msgspec.MsgspecError, LookupError, TypeError):
        raise BenchError(f"{client.base_url}/v1/models lists no model: name one with --model") from None


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise BenchError(f"the environment has no {variable}")
    return {"Authorization": f"Bearer {key}"}
