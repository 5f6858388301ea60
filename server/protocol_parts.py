"""Objects inside requests: what a stream carries, the answer's format, the expected output."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tokenmill.engine.messages import AudioFormat
from tokenmill.server.fields import VoiceName

MAX_SCHEMA_NAME = 64


class Strict(BaseModel):
    """A JSON object with known keys, strict types and finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """What a stream carries beside the text."""

    include_usage: bool = Field(
        False, description="One last chunk with the usage and no choices.", examples=[True]
    )
    continuous_usage_stats: bool = Field(
        False, description="With `include_usage`: the usage so far on each chunk.", examples=[False]
    )
    include_obfuscation: bool = Field(
        False, description="Accepted for OpenAI's clients; chunks are never padded.", examples=[False]
    )

    @property
    def usage_always(self) -> bool:
        """Whether each chunk carries the usage so far."""
        return self.include_usage and self.continuous_usage_stats


class JsonSchema(Strict):
    """A named JSON schema. Keys keep their order: properties are written in the schema's."""

    name: str = Field(
        min_length=1,
        max_length=MAX_SCHEMA_NAME,
        pattern=r"^[a-zA-Z0-9_-]+$",
        description="A name for the format.",
        examples=["answer"],
    )
    json_schema: dict[str, Any] | None = Field(
        None,
        alias="schema",
        description="The JSON schema; any JSON value if not given. Objects that list `properties` and don't "
        "mention `additionalProperties` get no other keys.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}],
    )
    strict: bool = Field(
        False, description="Schemas are always enforced to the letter, with either value.", examples=[True]
    )
    description: str | None = Field(
        None,
        max_length=4096,
        description="What the format is for. The model doesn't see it.",
        examples=["A city"],
    )


class ResponseFormat(Strict):
    """The format of the answer, enforced token by token."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`json_object`: any JSON object. `json_schema`: what the schema allows.",
        examples=["json_object"],
    )
    json_schema: JsonSchema | None = Field(
        None,
        description="The schema of the type `json_schema`, and only of that.",
        examples=[{"name": "answer", "schema": {"type": "object"}}],
    )


class AudioOptions(Strict):
    """How an answer is spoken."""

    format: AudioFormat | None = Field(
        None,
        description="`pcm16` has no header: 16-bit little-endian samples, mono, at 24 kHz; `opus` is in an Ogg "
        "file. Not given: `wav`, in a stream `pcm16`, which is the only one that can be streamed.",
        examples=["wav"],
    )
    voice: VoiceName | None = Field(
        None,
        description='A voice of the model\'s speech checkpoint, by its name or as `{"id": name}`; '
        "`GET /v1/models` lists them. The first of them if not given.",
        examples=["0"],
    )


class TextPart(Strict):
    """A piece of text."""

    type: Literal["text"] = Field(description="Always `text`.", examples=["text"])
    text: str = Field(description="The text.", examples=["def main():\n"])


class Prediction(Strict):
    """The output that the client expects. It makes the answer faster where it is right, never different."""

    type: Literal["content"] = Field(description="Always `content`.", examples=["content"])
    content: Annotated[list[TextPart], Field(min_length=1)] | str = Field(
        description="The expected text, or its parts.", examples=["def main():\n    pass\n"]
    )

    @property
    def text(self) -> str:
        """All of the expected text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)
