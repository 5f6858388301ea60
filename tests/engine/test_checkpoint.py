"""Sources are found, and damaged or foreign checkpoints are refused with one line (FAULTS rows 35 and 37)."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from checkpoints import copy_of, edit_json, tiny, tiny_gguf
from huggingface_hub import errors
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.engine.checkpoint import INDEX, WEIGHTS, resolve
from tokenmill.engine.load_error import LoadError
from tokenmill.engine.weight_files import read_gguf_header, read_safetensors_header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of(tiny("llama"), tmp_path / "model")


def refusal(source: str | Path) -> str:
    with pytest.raises(LoadError) as caught:
        resolve(str(source))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 600
    return message.removeprefix(f"{source}: ")


def header_of(file: Path) -> tuple[dict[str, object], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(file: Path, header: object, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def change_entry(folder: Path, **fields: object) -> None:
    header, body = header_of(folder / WEIGHTS)
    entry = header["model.norm.weight"]
    assert isinstance(entry, dict)
    entry.update(fields)
    rewrite(folder / WEIGHTS, header, body)


def split_in_shards(folder: Path) -> None:
    """One file becomes a file and an index that names it and one that isn't there."""
    header, _ = header_of(folder / WEIGHTS)
    header.pop("__metadata__", None)
    names = sorted(header)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map[names[-1]] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def misplaced(folder: Path, name: str) -> None:
    split_in_shards(folder)
    edit_json(folder / INDEX, weight_map={"model.unheard_of.weight": name})


def append(file: Path, data: bytes) -> None:
    file.write_bytes(file.read_bytes() + data)


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda x: (x / "config.json").unlink(), "no config.json"),
    "config cut": (lambda x: truncate(x / "config.json", 40), "config.json is no JSON"),
    "config nested": (lambda x: (x / "config.json").write_text("[" * 10**5), "config.json is no JSON"),
    "config a list": (lambda x: (x / "config.json").write_text("[1]"), "config.json is no JSON object"),
    "adapter": (lambda x: (x / "adapter_config.json").write_text("{}"), "adapter_config.json"),
    "packed": (
        lambda x: edit_json(x / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "bitsandbytes",
    ),
    "pickle": (only_pickle, "pytorch_model.bin may hold code"),
    "no weights": (lambda x: (x / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX}"),
    "empty file": (lambda x: truncate(x / WEIGHTS, 0), f"{WEIGHTS} is truncated"),
    "header cut": (lambda x: truncate(x / WEIGHTS, 100), f"{WEIGHTS} is truncated"),
    "data cut": (lambda x: truncate(x / WEIGHTS, 50_000), f"{WEIGHTS} is truncated"),
    "too long": (lambda x: append(x / WEIGHTS, b"\0"), "bytes that no tensor owns"),
    "no header": (lambda x: rewrite(x / WEIGHTS, b"{nothing", b""), "header that is no JSON"),
    "header a list": (lambda x: rewrite(x / WEIGHTS, [], b""), "header that is no map"),
    "no tensors": (lambda x: rewrite(x / WEIGHTS, {}, b""), "hold no tensor"),
    "wrong shape": (lambda x: change_entry(x, shape=[65]), "model.norm.weight is F32 [65]"),
    "negative shape": (lambda x: change_entry(x, shape=[-64]), "entry for model.norm.weight makes no sense"),
    "wrong dtype": (lambda x: change_entry(x, dtype="F64"), "model.norm.weight is F64"),
    "unknown dtype": (lambda x: change_entry(x, dtype="F5"), "unknown type F5"),
    "overlap": (lambda x: change_entry(x, data_offsets=[0, 256]), "is damaged"),
    "missing shard": (split_in_shards, "names model-00002-of-00002.safetensors, which isn't there"),
    "lying index": (lambda x: misplaced(x, "model-00001-of-00002.safetensors"), "which lacks it"),
    "escaping index": (lambda x: misplaced(x, "../model.safetensors"), "no safetensors file of this folder"),
    "pickle index": (lambda x: misplaced(x, "model.bin"), "no safetensors file of this folder"),
    "empty index": (lambda x: (split_in_shards(x), edit_json(x / INDEX, weight_map=None)), "no weight_map"),
}


def test_finds_a_folder(folder: Path) -> None:
    checkpoint = resolve(str(folder))
    assert checkpoint.folder == folder
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.stored_dtype == "F32"
    assert checkpoint.gguf_file is None


def test_finds_shards(folder: Path) -> None:
    split_in_shards(folder)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map=dict.fromkeys(names, "model-00001-of-00002.safetensors"))
    assert resolve(str(folder)).stored_dtype == "F32"


def test_finds_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve(str(file)).gguf_file == file


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_with_one_line(folder: Path, damage: str) -> None:
    inflict, words = DAMAGES[damage]
    inflict(folder)
    assert words in refusal(folder)


def test_finds_a_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "shipping_model" / "inner"
    inner.mkdir(parents=True)
    for place in (inner.parent, inner):
        (place / "__init__.py").write_text("raise RuntimeError('imported')")
    (inner.parent / "a.gguf").touch()
    (inner / "b.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:shipping_model/a.gguf").gguf_file == inner.parent / "a.gguf"
    assert resolve("package:shipping_model.inner/b.gguf").gguf_file == inner / "b.gguf"
    assert "shipping_model" not in sys.modules
    assert "ships no c.gguf" in refusal("package:shipping_model/c.gguf")
    assert "ships no ../outside.gguf" in refusal("package:shipping_model/../outside.gguf")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package:not_installed_here/a.gguf", "no Python package not_installed_here"),
        ("package:not_installed_here", "reads package:MODULE/FILE"),
        ("package:../a/b.gguf", "reads package:MODULE/FILE"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("", "no such file or folder"),
    ],
)
def test_refuses_what_is_not_there(source: str, words: str) -> None:
    assert words in refusal(source)


def test_refuses_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "neither a .gguf file nor a folder" in refusal(tmp_path / "notes.txt")


def test_offline_and_not_cached_tells_how_to_go_on() -> None:
    message = refusal("tokenmill-tests/not-in-any-cache")
    assert "HF_HUB_OFFLINE" in message
    assert "hf download" in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError, "asks for a licence"),
        (errors.RepositoryNotFoundError, "neither a folder here nor a repository"),
        (errors.RevisionNotFoundError, "has no revision v9"),
        (errors.LocalEntryNotFoundError, "can't be reached"),
        (errors.HFValidationError, "no Hub id"),
        (errors.HfHubHTTPError, "can't be fetched"),
        (RuntimeError, "can't be fetched"),
    ],
)
def test_what_the_hub_refuses(error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error.__new__(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(LoadError, match=words):
        resolve("vendor/name", "v9")


def test_a_download_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def download(name: str, *, revision: str | None, tqdm_class: Any, **_: object) -> str:
        files = tqdm_class(total=3, desc="Fetching 3 files")
        files.update(3)
        with tqdm_class(total=1000, unit="B", unit_scale=True, mininterval=0) as bar:
            for _ in range(4):
                bar.update(250)
                bar.refresh()
        return str(tiny("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    told: list[tuple[str, float | None]] = []
    checkpoint = resolve("vendor/name", None, lambda *x: told.append(x))
    assert (checkpoint.folder, checkpoint.hub_id) == (tiny("llama"), "vendor/name")
    assert {stage for stage, _ in told} == {"downloading vendor/name"}
    assert told[-1][1] == 1.0
    assert capfd.readouterr().err == ""


def test_a_gguf_header_is_read(tmp_path: Path) -> None:
    summary = read_gguf_header(tiny_gguf(tmp_path / "model.gguf"))
    assert (summary.architecture, summary.stored) == ("llama", "F32")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "is no GGUF file"),
        (lambda data: b"PK\3\4" + data[4:], "is no GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "version 9"),
        (lambda data: data[:-64], "is truncated"),
        (lambda data: data[:300], "corrupt"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "corrupt"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "corrupt"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 60) + data[32:], "runs past the end"),
        (lambda data: data.replace(b"general.architecture", b"general.architectura"), "corrupt"),
    ],
)
def test_refuses_a_damaged_gguf(tmp_path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    file = tiny_gguf(tmp_path / "model.gguf")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoadError, match=words) as caught:
        read_gguf_header(file)
    assert "model.gguf" in str(caught.value)


@cache
def whole_files() -> dict[Callable[[Path], object], bytes]:
    """An undamaged file for each reader."""
    gguf = tiny_gguf(tiny("llama").parent / "whole.gguf")
    return {
        read_safetensors_header: (tiny("llama") / WEIGHTS).read_bytes(),
        read_gguf_header: gguf.read_bytes(),
    }


@given(position=st.integers(0, 4000), value=st.binary(min_size=1, max_size=9))
def test_any_damage_to_a_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    for read, data in whole_files().items():
        file = folder / "file"
        content = bytearray(data)
        content[position : position + len(value)] = value
        file.write_bytes(content)
        with contextlib.suppress(LoadError):
            assert read(file)
