"""The shapes of what the server says about itself: its models and its health."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Status = Literal["loaded", "loading", "unloaded", "failed"]
NAME = "huggingfacetb/smollm2-135m-instruct"
REASON = "model.safetensors: truncated; download it again"
ROW = {
    "id": NAME,
    "object": "model",
    "created": 1767225600,
    "owned_by": "huggingfacetb",
    "root": NAME,
    "max_model_len": 8192,
    "status": "loaded",
}


class SpeechRow(BaseModel):
    """What speaks a model's answers."""

    status: Status = Field(description="Its process, as for models.", examples=["loaded"])
    voices: list[str] | None = Field(
        None,
        description="What requests may say as `audio.voice`, the default first.",
        examples=[["alloy", "0"]],
    )
    formats: list[str] | None = Field(
        None, description="What requests may say as `audio.format`.", examples=[["wav", "pcm16", "mp3"]]
    )
    reason: str | None = Field(None, description="Why it has failed.", examples=[REASON])


class ModelRow(BaseModel):
    """A model or a deployment of one."""

    id: str = Field(description="What requests say as `model`.", examples=[NAME])
    object: Literal["model"] = Field(description="Always `model`.", examples=["model"])
    created: int = Field(description="When the server started, in seconds since 1970.", examples=[1767225600])
    owned_by: str = Field(description="The name's first part.", examples=["huggingfacetb"])
    root: str = Field(description="The entry that a deployment belongs to.", examples=[NAME])
    max_model_len: int | None = Field(
        description="Tokens of prompt and completion together; null while the model isn't loaded.",
        examples=[8192],
    )
    status: Status = Field(description="`unloaded` models load when they are asked for.", examples=["loaded"])
    reason: str | None = Field(None, description="Why a model has failed.", examples=[REASON])
    speech: SpeechRow | None = Field(
        None,
        description="Where the model's entry has `speech`.",
        examples=[{"status": "loaded", "voices": ["0"], "formats": ["wav", "pcm16"]}],
    )


class ModelList(BaseModel):
    """All models and deployments."""

    object: Literal["list"] = Field(description="Always `list`.", examples=["list"])
    data: list[ModelRow] = Field(description="In the order of `models.yaml`.", examples=[[ROW]])


class LiveResponse(BaseModel):
    """The process runs."""

    status: Literal["ok"] = Field(description="Always `ok`.", examples=["ok"])


class HealthResponse(BaseModel):
    """Whether at least one model serves."""

    status: Literal["ok", "unavailable"] = Field(
        description="`ok` with the status 200, `unavailable` with 503.", examples=["ok"]
    )
    models: dict[str, Status] = Field(
        description="Every model's status, and `NAME:speech` for what speaks its answers.",
        examples=[{NAME: "loaded"}],
    )


class ModelHealthResponse(BaseModel):
    """Whether one model serves."""

    status: Literal["ok", "unavailable"] = Field(
        description="`ok` with the status 200, `unavailable` with 503.", examples=["ok"]
    )
    model: str = Field(description="The model's name.", examples=[NAME])
    state: Status = Field(description="The model's status.", examples=["loaded"])
    reason: str | None = Field(None, description="Why it has failed.", examples=[REASON])
