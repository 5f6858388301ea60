"""One server for all end-to-end tests, with a tiny random model and the packaged SmolLM2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_process import CONFIG, Server, serving

from tokenmill.engine.tiny import make_tiny


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    config = folder / "models.yaml"
    config.write_text(CONFIG.format(tiny=make_tiny("llama", folder / "tiny")))
    with serving(config) as running:
        yield running
