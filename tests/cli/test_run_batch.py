"""`jaxserve run-batch` on the demo model."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from jaxserve import LLM, InputError, SamplingParams
from jaxserve.cli.main import main
from jaxserve.server import app, logs, serve
from tests.cli.conftest import FLAGS

QUESTIONS = ["What is 27+45?", "What is the capital of France?", "Who are you?"]


def line(custom_id: str, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


@pytest.fixture
def without_engine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No engine is started, and the application answers nothing: enough for lines that are no requests."""
    monkeypatch.setattr(logs, "configure", lambda *_: None)  # which would be for all of this process
    monkeypatch.setattr(serve, "started_engine", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(app, "build_app", lambda *_: Starlette())
    return monkeypatch


def run_batch(source: Path | str, target: Path | str) -> int:
    return main(["run-batch", "-i", str(source), "-o", str(target), "--served-model-name", "it"])


def test_a_file_goes_in_and_the_answers_of_the_python_api_come_out(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "configure", lambda *_: None)  # which would be for all of this process
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    lines = [line(f"chat {i}", "/v1/chat/completions", messages=m, temperature=0) for i, m in enumerate(conversations)]
    lines += [line("text", "/v1/completions", prompt="One", temperature=0, max_tokens=7), "no request"]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n\n")
    assert main(["run-batch", "-i", str(source), "-o", str(target), "--served-model-name", "it", *FLAGS]) == 0
    results = [json.loads(text) for text in target.read_text().splitlines()]
    assert [result["custom_id"] for result in results] == ["chat 0", "chat 1", "chat 2", "text", None]
    greedy = SamplingParams(temperature=0, max_tokens=None)
    texts = [output.outputs[0].text for output in llm.chat(conversations, greedy)]
    expected = [text.rpartition("</think>")[2].strip() for text in texts]
    bodies = [result["response"]["body"] for result in results[:4]]
    assert [body["choices"][0]["message"]["content"] for body in bodies[:3]] == expected
    assert "72" in expected[0]
    assert (
        bodies[3]["choices"][0]["text"]
        == llm.generate("One", SamplingParams(temperature=0, max_tokens=7))[0].outputs[0].text
    )
    assert {body["model"] for body in bodies} == {"it"}
    assert results[4]["error"]["code"] == "invalid_line"
    tokens = sum(body["usage"]["completion_tokens"] for body in bodies)
    assert f"5 requests, 1 of them failed, {tokens} tokens in " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-i", "{folder}/none", "-o", "{folder}/out"], "cannot read the requests of"),
        (["-i", "{folder}/empty", "-o", "{folder}/out"], "holds no requests"),
        (["-i", "{folder}/good", "-o", "{folder}/none/out"], "cannot write the results to"),
        (["-i", "{folder}/good"], "-o"),
    ],
)
def test_files_are_checked_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], told: str
) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "good").write_text(line("1", "/v1/completions", prompt="x"))
    given = [word.format(folder=tmp_path) for word in words]
    assert main(["run-batch", *given, "--model", "/no/such/model"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("without_engine")
@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["the same", "symlink", "hard link"])
def test_the_requests_are_not_written_over(link: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = target = tmp_path / "requests"
    source.write_text("no request")
    if link:
        target = tmp_path / "link"
        link(source, target)
    assert run_batch(source, target) == 2
    assert "are the same file; give another one" in capsys.readouterr().err
    assert source.read_text() == "no request"


@pytest.mark.usefixtures("without_engine")
@pytest.mark.parametrize(("source", "target"), [("-", "requests"), ("requests", "-")])
def test_nor_are_those_of_a_standard_stream(
    source: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("requests").write_text("no request")
    with Path("requests").open("a+") as stream:
        stream.seek(0)
        monkeypatch.setattr("sys.stdin" if source == "-" else "sys.stdout", stream)
        assert run_batch(source, target) == 2
    assert "are the same file; give another one" in capsys.readouterr().err
    assert Path("requests").read_text() == "no request"


@pytest.mark.usefixtures("without_engine")
def test_devices_and_standard_streams_may_be_both(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requests").write_text("no request")
    (tmp_path / "-").write_text("not meant by -")
    monkeypatch.chdir(tmp_path)
    assert run_batch("/dev/null", "/dev/null") == 2
    assert "/dev/null holds no requests" in capsys.readouterr().err
    assert run_batch("requests", "/dev/null") == 0
    monkeypatch.setattr("sys.stdin", (tmp_path / "requests").open())
    assert run_batch("-", "-") == 0
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "invalid_line"
    assert (tmp_path / "-").read_text() == "not meant by -"


def test_earlier_results_are_kept_until_the_engine_has_started(
    tmp_path: Path, without_engine: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "requests", tmp_path / "results"
    source.write_text("no request")
    target.write_text("earlier\n")

    @contextlib.contextmanager
    def fails(*_: Any) -> Iterator[None]:
        raise InputError("no engine")
        yield

    with without_engine.context() as patch:
        patch.setattr(serve, "started_engine", fails)
        assert run_batch(source, target) == 2
    assert target.read_text() == "earlier\n"
    assert run_batch(source, target) == 0
    (result,) = target.read_text().splitlines()
    assert json.loads(result)["error"]["code"] == "invalid_line"


@pytest.mark.usefixtures("without_engine")
def test_a_single_failure_is_a_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "requests").write_text("no request")
    assert run_batch(tmp_path / "requests", tmp_path / "results") == 0
    assert "1 request, 1 of them failed, 0 tokens in " in capsys.readouterr().err


@pytest.mark.usefixtures("without_engine")
@pytest.mark.parametrize("target", ["-", "/dev/full"])
def test_a_full_disk_is_one_line(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requests").write_text("no request")
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert run_batch(tmp_path / "requests", target) == 1
    printed = capsys.readouterr().err
    assert "could not all be written (No space left on device)" in printed
    assert printed.count("\n") == 1
