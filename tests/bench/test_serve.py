"""`tokenmill bench serve` from its command line to its report, against fake servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_openai import FakeServer

from tokenmill.bench import cli, limits
from tokenmill.bench.load import Outcome
from tokenmill.bench.reply import Reply
from tokenmill.bench.serve import ratios_of


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CPU_READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits, "CPU_MATMUL", 64)


def bench(tmp_path: Path, *options: str) -> tuple[int, list[dict[str, object]]]:
    """The exit status and the result of each JSON row."""
    file = tmp_path / "rows.jsonl"
    lengths = ["--prompt-tokens", "12", "--output-tokens", "4"]
    status = cli.main(["serve", *lengths, "--json", str(file), *options])
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return status, [row["result"] for row in rows]


def test_one_server_closed_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer().in_thread() as server:
        status, rows = bench(tmp_path, "--base-url", server.url, "--concurrency", "1,3", "--requests", "5")
    assert status == 0
    assert [row["load"] for row in rows] == [1, 3]
    assert [(row["requests"], row["failures"], row["output_tokens"]) for row in rows] == [(5, 0, 20)] * 2
    assert rows[0]["prompt_tokens"] == 60
    assert rows[0]["share_of_limit"] is None
    measured = server.requests[2:]
    assert len(measured) == 10
    assert all(request["model"] == "fake/model" for request in measured)
    assert len({tuple(request["prompt"]) for request in measured}) == 10
    assert "TTFT" in capsys.readouterr().out


def test_several_servers_alternate_with_the_same_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    class Noting(FakeServer):
        def _events(self, request: dict[str, object], chat: bool) -> list[str]:
            order.append(self.url)
            return super()._events(request, chat)

    with Noting().in_thread() as one, Noting(tokens_per_event=2).in_thread() as other:
        status, rows = bench(
            tmp_path,
            *("--base-url", one.url, "--base-url", other.url, "--name", "one", "--name", "other"),
            *("--concurrency", "2", "--requests", "3", "--plot", str(tmp_path / "plot.png")),
        )
    assert status == 0
    assert [row["series"] for row in rows] == ["one", "other"]
    assert [len(row["rounds_output_tokens_per_s"]) for row in rows] == [3, 3]  # type: ignore[arg-type]
    warm_up = [one.url] * 2 + [other.url] * 2
    assert order == warm_up + ([one.url] * 3 + [other.url] * 3) * 3
    asked, asked_other = (
        [
            sorted(map(str, (r["prompt"] for r in server.requests[2 + 3 * turn : 5 + 3 * turn])))
            for turn in range(3)
        ]
        for server in (one, other)
    )
    assert asked == asked_other
    assert len({prompt for turn in asked for prompt in turn}) == 9
    assert "Output rate over that of one" in capsys.readouterr().out
    assert (tmp_path / "plot.png").exists()


def test_open_loop_with_chat_and_a_known_model(tmp_path: Path) -> None:
    with FakeServer(piece=50).in_thread() as server:
        status, rows = bench(
            tmp_path,
            *("--base-url", server.url + "/v1", "--rate", "200,400", "--requests", "6"),
            *("--path", "/v1/chat/completions", "--prompts", "text", "--model", "named"),
            *("--weights-mb", "269", "--kv-kb", "23", "--dtype", "float32", "--extra-body", '{"top_k": 1}'),
        )
    assert status == 0
    assert [row["load"] for row in rows] == [200, 400]
    assert all(isinstance(row["share_of_limit"], float) for row in rows)
    assert {(request["model"], request["top_k"]) for request in server.requests} == {("named", 1)}


def test_fields_of_each_server_and_answers_that_end_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer().in_thread() as one, FakeServer(most_tokens=3).in_thread() as other:
        status, rows = bench(
            tmp_path,
            *("--base-url", one.url, "--base-url", other.url, "--name", "one", "--name", "other"),
            *("--extra-body", "{}", "--extra-body", '{"ignore_eos": null}'),
            *("--concurrency", "1", "--rounds", "1", "--no-limits"),
        )
    assert status == 0
    assert [(row["output_tokens"], row["asked_tokens"]) for row in rows] == [(16, 16), (12, 16)]
    assert all(request["ignore_eos"] for request in one.requests)
    assert not any("ignore_eos" in request for request in other.requests)
    shown = capsys.readouterr().out
    assert "other at 1 made 12 of the 16 tokens" in shown
    assert "one at 1 made" not in shown


def test_a_key_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_KEY", "sesame")
    with FakeServer().in_thread() as server:
        options = ("--base-url", server.url, "--concurrency", "1", "--no-limits", "--api-key-env", "FAKE_KEY")
        status, _ = bench(tmp_path, *options)
    assert status == 0
    assert all("Authorization: Bearer sesame\r\n" in head for head in server.headers)
    assert "sesame" not in (tmp_path / "rows.jsonl").read_text()


def test_a_server_that_refuses_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(fail_with=401).in_thread() as server:
        status, rows = bench(tmp_path, "--base-url", server.url, "--name", "locked", "--no-limits")
    assert (status, rows) == (1, [])
    assert capsys.readouterr().err == "tokenmill bench: locked: status 401: no, thank you\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base-url", "http://127.0.0.1:1"], "http://127.0.0.1:1 can't be reached"),
        (["--base-url", "nowhere"], "no http or https URL"),
        (["--base-url", "http://a", "--base-url", "http://b", "--name", "x"], "2 servers and 1 names"),
        (["--base-url", "http://a", "--base-url", "http://a", "--model", "m"], "two servers of one name"),
        (["--base-url", "http://a", "--path", "/v1/chat/completions"], "chat takes text"),
        (["--base-url", "http://a", *["--extra-body", "{}"] * 2], "given 2 times for 1 servers"),
        (["--base-url", "http://a", "--extra-body", "no"], "--extra-body is no JSON"),
        (["--base-url", "http://a", "--api-key-env", "SURELY_NOT_SET"], "no SURELY_NOT_SET"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = bench(tmp_path, "--no-limits", *options)
    assert (status, rows) == (1, [])
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "nan", "x", "1,,2"])
def test_an_impossible_rate_is_refused(rate: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--base-url", "http://a", f"--rate={rate}"])


@pytest.mark.parametrize("numbers", ["0", "-1", "1.5", "x", ""])
def test_an_impossible_concurrency_is_refused(numbers: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--base-url", "http://a", f"--concurrency={numbers}"])


def test_ratios_leave_out_rounds_without_a_base() -> None:
    def outcome(tokens: int) -> Outcome:
        return Outcome([Reply(0.0, arrivals=[1.0], completion_tokens=tokens)], seconds=1.0)

    assert ratios_of([outcome(6), outcome(9)], [outcome(3), outcome(0)]) == [2.0]
