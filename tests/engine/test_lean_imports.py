"""An engine process leaves out what it doesn't use of torch and transformers, and computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from checkpoints import tiny

LOAD = """
import json, sys, torch
from functools import partial
from tokenmill.engine.config import EngineConfig
from tokenmill.engine import attention, guards, loader
model = loader.load(EngineConfig(source=sys.argv[1]), lambda *stage: None)
texts = [torch.arange(3, 3 + n) for n in guards.LENGTHS]
layers = attention.probe_layers(model.module)
logits = torch.cat(guards.run_paged(partial(attention.forward, model.module), layers, texts))
heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "scipy", "sklearn")
print(json.dumps([logits.flatten().tolist()[:2000], [x for x in heavy if x in sys.modules]]))
"""
LEAN = "from tokenmill.engine.lean_imports import import_transformers\nlean = import_transformers()\n"


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("model_type", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_a_model_is_the_same_without_the_rest_which_can_be_imported_later(model_type: str) -> None:
    later = """
import gc, importlib
assert "torch._dynamo" not in sys.modules and "_dynamo" not in vars(torch)
assert torch.distributed.is_available() and gc.isenabled()
indexing = importlib.import_module("transformers.masking_utils").TransformGetItemToIndex()
assert type(indexing).__module__.startswith("torch._dynamo"), type(indexing)
assert callable(torch._dynamo.reset)
import scipy.optimize
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""
    folder = str(tiny(model_type))
    plain, _ = json.loads(run(LOAD, folder))
    found, compiled = run(LEAN + "assert lean" + LOAD + later, folder).splitlines()
    lean, heavy = json.loads(found)
    assert lean == plain
    assert heavy == []
    assert compiled == "2.0"


def test_a_transformers_that_needs_the_rest_is_imported_plainly_and_stays_so() -> None:
    script = """
import sys
from tokenmill.engine import lean_imports
used, lean_imports.USED = lean_imports.USED, ("modeling_utils", "no_such_module")
print(lean_imports.import_transformers(), any(x.startswith("transformers") for x in sys.modules))
import transformers.modeling_utils
lean_imports.USED = used
print(lean_imports.import_transformers(), transformers.utils.is_torch_distributed_available())
print("torch._dynamo" in sys.modules)
"""
    assert run(script) == "False False\nFalse True\nTrue\n"
