"""`jaxserve run-batch` on the demo model."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.cli.main import main
from jaxserve.server import logs
from tests.cli.conftest import FLAGS

QUESTIONS = ["What is 27+45?", "What is the capital of France?", "Who are you?"]


def line(custom_id: str, url: str, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


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
