"""Tools as requests bring them, in OpenAI's shape, and which of them may or must be called."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, Field, ValidationError

from tokenmill.server.errors import bad_request, shorten
from tokenmill.server.fields import refused
from tokenmill.server.parse import describe
from tokenmill.server.protocol_parts import Strict
from tokenmill.server.protocol_sampling import SamplingFields
from tokenmill.server.tool_schema import check_parameters

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise refused(f"must be 1 to 64 letters, digits, underscores and dashes, not {shorten(value)}")
    return value


class Function(Strict):
    """A function that the model may call."""

    name: Annotated[str, AfterValidator(_name)] = Field(
        description="Its name: letters, digits, underscores and dashes.", examples=["get_weather"]
    )
    description: str | None = Field(
        None, description="What it does, for the model to read.", examples=["The weather in a city"]
    )
    parameters: dict[str, Any] | None = Field(
        None,
        description="JSON schema of its arguments, an object; no arguments if not given. Where it is enforced, "
        "objects that list `properties` and don't mention `additionalProperties` get no other keys.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}],
    )
    strict: bool | None = Field(
        None,
        description="Whether arguments must fit the schema under the choice `auto` too. They can be made to where "
        "the model's calls begin with a marker (Hermes, Qwen, Mistral, DeepSeek); calls in bare JSON (Llama 3, "
        "models without a form of their own) can't be told from other JSON while they are written. A call that "
        "is demanded, by `required` or by name, always fits.",
        examples=[True],
    )

    def definition(self) -> dict[str, object]:
        """As chat templates read it."""
        function: dict[str, object] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class Tool(Strict):
    """One of a request's `tools`."""

    type: Literal["function"] = Field(description="Always `function`.", examples=["function"])
    function: Function = Field(description="The function.", examples=[{"name": "get_weather"}])
    cache_control: dict[str, Any] | None = Field(None, description="Accepted without effect.", examples=[{}])


class _Tools(Strict):
    tools: list[Tool] = Field(max_length=MAX_TOOLS)


class ToolSet(msgspec.Struct, frozen=True):
    """The tools that a model is offered for one request."""

    tools: list[Tool]
    required: bool
    """Whether it must call one."""
    parallel: bool
    """Whether it may call several."""

    @property
    def functions(self) -> dict[str, frozenset[str]]:
        """The functions by name, and of each the parameters that are strings."""
        return {tool.function.name: _strings(tool.function.parameters or {}) for tool in self.tools}


def read_tools(request: SamplingFields) -> ToolSet | None:
    """The tools of a request; None where it has none or wants none called. Raises `ApiError` 400."""
    tools = _tools(request.tools) if request.tools else []
    for number, tool in enumerate(tools):
        if tool.function.parameters is not None:
            check_parameters(tool.function.parameters, f"tools.{number}.function.parameters")
    named = _chosen(request.tool_choice, tools)
    if not tools or request.tool_choice == "none":
        return None
    offered = [tool for tool in tools if named in (None, tool.function.name)]
    return ToolSet(
        offered,
        required=request.tool_choice not in (None, "auto"),
        # A named function is called once.
        parallel=named is None and request.parallel_tool_calls is not False,
    )


def _strings(schema: dict[str, Any]) -> frozenset[str]:
    """The properties of an object that may be strings."""
    properties = schema.get("properties", {})
    kinds = {name: field.get("type") for name, field in properties.items() if isinstance(field, dict)}
    return frozenset(
        name
        for name, kind in kinds.items()
        if kind == "string" or (isinstance(kind, list) and "string" in kind)
    )


def _tools(values: list[dict[str, Any]]) -> list[Tool]:
    try:
        tools = _Tools.model_validate({"tools": values}).tools
    except ValidationError as error:
        raise describe(error, _Tools) from None
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise bad_request(f"tools: the function {twice} is there twice", "tools")
    return tools


def _chosen(choice: object, tools: list[Tool]) -> str | None:
    """The name of the one function that `tool_choice` demands, if it does. Raises `ApiError` 400."""
    match choice:
        case None | "none" | "auto":
            return None
        case "required":
            name = None
        case {"type": "function", "function": {"name": str(name), **other}, **rest} if not (rest or other):
            pass
        case _:
            allowed = 'none, auto, required or {"type": "function", "function": {"name": …}}'
            raise bad_request(f"tool_choice must be {allowed}, not {shorten(choice)}", "tool_choice")
    if not tools:
        raise bad_request("tool_choice demands a call, and there are no tools", "tool_choice")
    if name is not None and all(tool.function.name != name for tool in tools):
        raise bad_request(f"tool_choice: none of the tools is named {shorten(name)}", "tool_choice")
    return name
