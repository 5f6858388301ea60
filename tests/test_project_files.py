"""The frame around the code: the documents name what exists, and set-up steps report as they should."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from tokenmill.engine.config import KVCacheConfig
from tokenmill.server.config import Defaults, Deployment, Entry, FimMarkup, Limits, ServerConfig, Speculation
from tokenmill.server.config_file import parse_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/clients.md",
    "docs/configuration.md",
)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_files_that_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:server|engine|kernels|bench|tests|docs|tools|\.ci)/[\w./-]*)`", text)
    linked = re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text)
    assert named or linked
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [path for path in linked if not (ROOT / name).parent.joinpath(path).exists()]
    assert missing == []


@pytest.mark.parametrize("folder", ["server", "engine", "kernels"])
def test_every_file_can_be_found_from_the_architecture_page(folder: str) -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    _, _, table = page.partition(f"| idea | `{folder}/` |")
    named = re.findall(r"`([\w/]+\.py)`", table.partition("\n\n")[0])
    there = [str(file.relative_to(ROOT / folder)) for file in (ROOT / folder).rglob("*.py")]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_make_targets_that_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
    assert {"setup", "serve", "test", "test-all", "lint", "bench", "gpu-check"} <= targets
    assert named - targets == set()


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )


def test_the_readme_starts_with_the_two_commands() -> None:
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["make serve", "make test"]


def test_the_readmes_configuration_is_accepted() -> None:
    (text,) = blocks("yaml")
    assert set(parse_config(text).models) == {"qwen/qwen3-0.6b", "me/fine-tune"}


@pytest.mark.parametrize(
    "section", [ServerConfig, Defaults, Entry, Deployment, Limits, Speculation, KVCacheConfig, FimMarkup]
)
def test_every_key_of_the_configuration_is_described(section: type[msgspec.Struct]) -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`(?:\w+\.)?(\w+)`", text))
    assert set(section.__struct_fields__) - described == set()


def test_the_readmes_python_is_python() -> None:
    assert len(blocks("python")) == 2
    for text in blocks("python"):
        compile(text, "README.md", "exec")


def step(log: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tools" / "step", log, "a title", "bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_step_that_works_is_quiet(tmp_path: Path) -> None:
    done = step(tmp_path / "log", "echo noise; echo more >&2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a title\n", "")
    assert (tmp_path / "log").read_text() == "noise\nmore\n"


def test_a_step_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    done = step(tmp_path / "log", "seq 100; exit 7")
    assert done.returncode == 7
    assert done.stdout == "a title\n"
    assert "    | 100\n" in done.stderr
    assert "| 50\n" not in done.stderr
