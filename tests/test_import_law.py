"""The laws of docs/architecture.md that the source shows: who may import whom, and what never appears."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_graph import Edge, Graph, belongs, cycles, read_graph, room_of, with_parents

ROOT = Path(__file__).parents[1]

# The engine's modules that a process without torch uses: the front end's, and the scheduling core.
SHARED = ("messages", "config", "sampling_params", "tokenizer", "detokenizer")
TORCH_FREE = tuple(
    f"tokenmill.engine.{name}" for name in (*SHARED, "grammar", "scheduler", "block_pool", "request")
)
TENSORS = ("torch", "transformers", "accelerate", "triton", "torchao", "torchvision")
PICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib")
HTTP_SERVER = ("fastapi", "starlette", "uvicorn")

# What each room may import of ours, beside itself.
OURS = {
    "server": tuple(f"tokenmill.engine.{name}" for name in SHARED),
    "engine": ("tokenmill.kernels",),
    "kernels": (),
    "bench": ("tokenmill.engine",),
}
OUTSIDE_NEVER = {"server": TENSORS, "engine": HTTP_SERVER, "kernels": HTTP_SERVER, "bench": HTTP_SERVER}

# The exceptions, each inside a function: sub-commands of the one command line, loaded when they are asked
# for, and the GPU check, which holds each kernel against its reference.
WHEN_CALLED = {
    ("tokenmill.server.cli", "tokenmill.bench.cli"),
    ("tokenmill.server.cli", "tokenmill.engine.tiny"),
    ("tokenmill.bench.gpu_check", "tokenmill.kernels"),
    ("tokenmill.bench.gpu_correct", "tokenmill.kernels"),
    ("tokenmill.bench.gpu_measure", "tokenmill.kernels"),
    ("tokenmill.bench.gpu_runner", "tokenmill.kernels"),
}
LAZY_EXPORTS = "tokenmill.engine"
"""Its `__getattr__` imports what `from tokenmill.engine import LLM` asks for: nothing on import."""


def excepted(edge: Edge) -> bool:
    return edge.when == "call" and any(
        edge.source == source and belongs(edge.target, target) for source, target in WHEN_CALLED
    )


def border_violations(graph: Graph) -> list[str]:
    """Imports that cross a border where none may be crossed."""
    wrong = []
    for edge in graph.edges:
        room, target_room = room_of(edge.source), room_of(edge.target)
        assert room is not None
        if target_room is None:
            forbidden = any(belongs(edge.target, name) for name in OUTSIDE_NEVER[room])
        else:
            allowed = target_room == room or any(belongs(edge.target, name) for name in OURS[room])
            forbidden = not allowed and not excepted(edge)
        if forbidden:
            wrong.append(str(edge))
    return wrong


def tensor_paths(graph: Graph, start: str) -> list[str]:
    """The ways by which importing or using `start` would load a tensor library, as chains of imports."""
    found, seen, queue = [], {start}, [(start, start)]
    while queue:
        module, chain = queue.pop()
        for edge in graph.imports_of(module):
            if edge.when == "typing" or excepted(edge) or (edge.when == "call" and module == LAZY_EXPORTS):
                continue
            if any(belongs(edge.target, name) for name in TENSORS):
                found.append(f"{chain} → {edge.target}")
            for target in with_parents(edge.target):
                if target in graph.modules and target not in seen:
                    seen.add(target)
                    queue.append((target, f"{chain} → {target}"))
    return found


def forbidden_code(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Ways to run what a file holds: pickle and its kin, torch.load, code that comes with a checkpoint."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [name.name for name in node.names]
            )
            if any(belongs(name, pickler) for name in names for pickler in PICKLERS):
                yield node.lineno, "imports a pickler"
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) == "torch.load":
                yield node.lineno, "calls torch.load"
            for keyword in node.keywords:
                trusting = keyword.arg in ("trust_remote_code", "allow_pickle")
                if trusting and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield node.lineno, f"passes {keyword.arg}"


def has_test(tree: ast.Module) -> bool:
    """Whether pytest would collect anything, or hypothesis' state machine, from this module."""

    def is_test(node: ast.AST) -> bool:
        return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test")

    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test") else []
        machine = isinstance(node, ast.Assign) and ast.unparse(node.value).endswith(".TestCase")
        if is_test(node) or machine or any(map(is_test, inside)):
            return True
    return False


@pytest.fixture(scope="module")
def graph() -> Graph:
    return read_graph(ROOT)


def test_borders_between_rooms(graph: Graph) -> None:
    assert border_violations(graph) == []


def test_no_import_cycles(graph: Graph) -> None:
    assert cycles(graph) == []


def test_front_end_reaches_no_tensor_library(graph: Graph) -> None:
    servers = [name for name in graph.modules if room_of(name) == "server"]
    assert servers
    assert [path for name in servers for path in tensor_paths(graph, name)] == []


def test_torch_free_modules_reach_no_tensor_library(graph: Graph) -> None:
    present = [name for name in TORCH_FREE if name in graph.modules]
    assert present
    assert [path for name in present for path in tensor_paths(graph, name)] == []


def test_shared_modules_load_without_torch(graph: Graph) -> None:
    """The same in a fresh interpreter: what the packages that we import do is seen too."""
    present = [name for name in TORCH_FREE if name in graph.modules]
    code = f"import sys, {', '.join(present)}; print([m for m in {TENSORS} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


def test_kernels_is_a_namespace_folder() -> None:
    """A top-level package of this name would shadow the PyPI package `kernels` that transformers imports."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_folder_is_shipped(graph: Graph) -> None:
    """A plain `pip install .` copies only the folders that pyproject.toml names."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "packages"
    ]
    folders = {
        ".".join(("tokenmill", *path.parent.relative_to(ROOT).parts)) for path in graph.modules.values()
    }
    assert folders - set(listed) == set()


def test_nothing_runs_what_a_file_holds(graph: Graph) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in graph.modules.values()
        for line, what in forbidden_code(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_every_test_module_has_a_test() -> None:
    modules = sorted((ROOT / "tests").rglob("test_*.py"))
    empty = [str(path.relative_to(ROOT)) for path in modules if not has_test(ast.parse(path.read_text()))]
    assert empty == []


def test_module_names_in_tests_are_unique() -> None:
    """Without packages in tests/, pytest imports by the bare file name."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


# The checkers themselves, on small trees that break each law.


def tree(folder: Path, files: dict[str, str]) -> Graph:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_graph(folder)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("server/app.py", "import torch"),
        ("server/app.py", "def late():\n    from torch import nn"),
        ("server/app.py", "from tokenmill.engine.scheduler import Scheduler"),
        ("server/app.py", "from tokenmill import kernels"),
        ("server/app.py", "from tokenmill.engine import LLM"),
        ("server/app.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("server/app.py", "def late():\n    import tokenmill.bench.cli"),
        ("server/cli.py", "import tokenmill.bench.cli"),
        ("engine/host.py", "import fastapi"),
        ("engine/host.py", "from tokenmill.server import app"),
        ("engine/host.py", "import importlib\nimportlib.import_module('tokenmill.server.app')"),
        ("kernels/gpu/linear.py", "from tokenmill.engine.messages import Add"),
        ("kernels/cpu/linear.py", "from ...engine import messages"),
        ("bench/serve.py", "from tokenmill.server.protocol import Completion"),
        ("bench/serve.py", "def late():\n    from tokenmill.kernels import reference"),
    ],
)
def test_a_crossed_border_is_found(tmp_path: Path, path: str, text: str) -> None:
    graph = tree(
        tmp_path,
        {"engine/messages.py": "", "engine/scheduler.py": "", "kernels/reference.py": "", path: text},
    )
    assert len(border_violations(graph)) == 1


def test_permitted_imports_pass(tmp_path: Path) -> None:
    graph = tree(
        tmp_path,
        {
            "server/cli.py": "def main():\n    import tokenmill.bench.cli, tokenmill.engine.tiny",
            "server/app.py": "import fastapi\nfrom tokenmill.engine import messages\nfrom .auth import check",
            "server/auth.py": "",
            "engine/messages.py": "",
            "engine/tiny.py": "import torch\nfrom tokenmill.kernels import reference",
            "kernels/reference.py": "import torch",
            "bench/cli.py": "from tokenmill.engine import LLM",
        },
    )
    assert border_violations(graph) == []
    assert tensor_paths(graph, "tokenmill.server.cli") == []


def test_a_cycle_is_found_unless_it_waits_for_a_call(tmp_path: Path) -> None:
    files = {
        "engine/a.py": "from . import b",
        "engine/b.py": "import tokenmill.engine.c",
        "engine/c.py": "from .a import x",
    }
    assert cycles(tree(tmp_path, files)) == [
        ["tokenmill.engine.a", "tokenmill.engine.b", "tokenmill.engine.c"]
    ]
    assert cycles(tree(tmp_path, {**files, "engine/c.py": "def f():\n    from .a import x"})) == []


def test_torch_is_found_through_other_modules(tmp_path: Path) -> None:
    graph = tree(
        tmp_path,
        {
            "engine/__init__.py": "def __getattr__(name):\n    from tokenmill.engine.llm import LLM",
            "engine/llm.py": "import torch",
            "engine/scheduler.py": "from tokenmill.engine.block_pool import BlockPool",
            "engine/block_pool.py": "def zeros():\n    from tokenmill.engine import kv_cache",
            "engine/kv_cache.py": "import torch.nn",
            "engine/request.py": "import dataclasses",
        },
    )
    chain = "tokenmill.engine.scheduler → tokenmill.engine.block_pool → tokenmill.engine.kv_cache → torch.nn"
    assert tensor_paths(graph, "tokenmill.engine.scheduler") == [chain]
    assert tensor_paths(graph, "tokenmill.engine.request") == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "x = torch.load(path)",
        "load(path, trust_remote_code=flag)",
    ],
)
def test_forbidden_code_is_found(text: str) -> None:
    assert len(list(forbidden_code(ast.parse(text)))) == 1


def test_an_empty_test_module_is_found() -> None:
    assert not has_test(ast.parse("def helper(): ...\nclass TestNothing:\n    x = 1"))
    assert has_test(ast.parse("class TestOne:\n    def test_it(self): ..."))
    assert has_test(ast.parse("TestPool = PoolMachine.TestCase"))
