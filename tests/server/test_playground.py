"""The playground page as it is served: complete, closed to other hosts, shipped. What it does needs a browser."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from live_server import LiveServer

from tokenmill.server.auth import PUBLIC_PATHS
from tokenmill.server.playground_files import FILES, FOLDER
from tokenmill.server.version import VERSION

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", FILES)
def test_files_are_served_under_a_strict_policy(server: LiveServer, path: str) -> None:
    answer = server.client.get(path, headers={"accept": "text/html,*/*"})
    assert answer.status_code == 200
    assert answer.content == (FOLDER / FILES[path][0]).read_bytes()
    assert answer.headers["content-type"].startswith(FILES[path][1])
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[kind] for kind in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_page_is_open_where_keys_are_needed(start: Callable[..., LiveServer]) -> None:
    """A browser has no key before the page that asks for it; what the page shows of models needs one."""
    live = start(keys=("first",))
    for path in FILES:
        assert path in PUBLIC_PATHS
        assert live.client.get(path).status_code == 200
    assert live.client.get("/v1/models").status_code == 401
    assert live.client.get("/playground/../v1/models").status_code == 401


def test_every_file_is_used_and_served() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {name for name, _ in FILES.values()}
    text = "".join(path.read_text(encoding="utf-8") for path in FOLDER.iterdir())
    for path, (name, _) in FILES.items():
        assert path == "/" or path[1:] in text or f'"./{name}"' in text, name


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: str(path.name))
def test_nothing_leaves_the_server_and_text_stays_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[\w.]+\.\w+/|@import|\burl\(", text)
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|srcdoc"
    assert not re.search(markup, text)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|cookie", text), "the key stays in memory"
    if path.suffix == ".html":
        # The policy forbids code and styles inside the page.
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)


def test_every_control_has_a_label() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    for control in re.finditer(r"<(input|select|textarea)\b", page):
        before = page[: control.start()]
        assert before.rfind("<label") > before.rfind("</label>"), page[control.start() :][:60]


def test_controls_that_the_code_names_exist() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js"))
    named = set(re.findall(r'(?:\$|field|number)\("([\w-]+)"', code))
    assert {"prompt", "temperature", "top_p", "schema"} <= named
    assert named <= set(re.findall(r'\bid="([\w-]+)"', page))


def test_page_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "playground/*" in project["tool"]["setuptools"]["package-data"]["tokenmill.server"]
    assert project["project"]["version"] == VERSION


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/json", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
        ("text/html, application/json", "text/html"),
        ("*/*", "text/html"),
    ],
)
def test_front_page_by_what_the_client_accepts(server: LiveServer, accept: str, kind: str) -> None:
    answer = server.client.get("/", headers={"accept": accept})
    assert answer.headers["content-type"].startswith(kind)
    assert answer.headers["vary"] == "accept"


def test_front_page_for_programs(server: LiveServer) -> None:
    about = server.client.get("/", headers={"accept": "application/json"}).json()
    assert (about["name"], about["version"]) == ("tokenmill", VERSION)
    for link in about["links"].values():
        assert server.client.get(link).status_code == 200, link


def test_documentation_page_needs_no_other_host(server: LiveServer) -> None:
    page = server.client.get("/docs")
    assert page.status_code == 200
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) == 3
    for source in sources:
        assert source.startswith("/docs/")
        file = server.client.get(source)
        assert file.status_code == 200
        assert len(file.content) > 1000
    assert "https:" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
