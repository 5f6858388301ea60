"""Chat templates: Jinja in a sandbox, as transformers renders them, with a bound on the work they may do.

A template comes with a checkpoint and is untrusted. The sandbox keeps it from Python's internals; here every
turn of a loop and every call is paid from a budget, and products of sequences are limited, so that no
template can hold the server: a fault is raised after a bounded number of steps, without clocks or threads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

MAX_STEPS = 200_000
MAX_CHARACTERS = 16 << 20
_BUDGET = "tokenmill steps"


class TemplateFault(ValueError):
    """The template is broken, refused its input (`raise_exception`) or did too much; the text says which."""


class ChatTemplate:
    """One compiled chat template. Raises `TemplateFault` when it can't be compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self.source = source
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.filters[_CHARGED] = _charged
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["dict"] = _PlainDict()
        environment.globals["namespace"] = _Namespace
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TemplateFault(f"the chat template can't be compiled: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt for a conversation. Raises `TemplateFault`."""
        steps = [MAX_STEPS]
        context = {
            **self._special_tokens,
            **variables,
            "messages": messages,
            "tools": tools,
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
            _BUDGET: steps,
        }
        pieces: list[str] = []
        left = MAX_CHARACTERS
        try:
            for piece in self._template.generate(context):
                left -= len(piece)
                if left < 0:
                    raise TemplateFault(f"the chat template wrote more than {MAX_CHARACTERS} characters")
                pieces.append(piece)
        except TemplateFault:
            raise
        except RecursionError:
            raise TemplateFault("the chat template calls itself without end") from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            MemoryError,
        ) as error:
            raise TemplateFault(f"the chat template failed: {error}") from None
        return "".join(pieces)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with loops and calls charged to the render's budget."""

    intercepted_binops = frozenset(["*", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            line = loop.iter.lineno
            loop.iter = jinja2.nodes.Filter(loop.iter, _CHARGED, [], [], None, None, lineno=line)
        return tree

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _charge(context)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(sequence, str | list | tuple):
                    _limit(len(sequence) * times)
        elif isinstance(left, int) and isinstance(right, int):
            _limit(left.bit_length() * right)
        return super().call_binop(context, operator, left, right)


_CHARGED = "tokenmill charged"


@jinja2.pass_context
def _charged(context: jinja2.runtime.Context, items: Iterable[object]) -> Iterator[object]:
    for item in items:
        _charge(context)
        yield item


def _charge(context: jinja2.runtime.Context) -> None:
    steps = cast(list[int], context.resolve(_BUDGET))
    steps[0] -= 1
    if steps[0] < 0:
        raise TemplateFault(f"the chat template took more than {MAX_STEPS} steps")


def _limit(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateFault(f"the chat template made a value of size {size}")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what a model wrote, for training; rendering just passes it through."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainDict:
    """`dict(...)` without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    fromkeys: Callable[..., dict[Any, Any]] = staticmethod(dict.fromkeys)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscore names, which could reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise TemplateFault(f"the chat template stores {name!r} on a namespace; names may not begin with '_'")


def _raise_exception(message: str) -> None:
    raise TemplateFault(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it: Jinja's own filter would escape HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
