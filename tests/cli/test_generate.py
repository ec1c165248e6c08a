"""`jaxserve generate` on the demo model."""

import io
import json
from pathlib import Path

import pytest

from jaxserve import LLM
from jaxserve.cli.main import main
from tests.cli.conftest import FLAGS

pytestmark = pytest.mark.usefixtures("started")


def test_prompts_are_printed_with_their_completions(capsys: pytest.CaptureFixture):
    assert main(["generate", "--chat", "What is 27+45?", "--temperature", "0", "What is the capital of France?"]) == 0
    printed = capsys.readouterr()
    first, second = printed.out.split("> ")[1:]
    assert first.startswith("What is 27+45?\n")
    assert "72" in first
    assert "Paris" in second
    assert "<think>" not in printed.out
    assert printed.err.startswith("2 prompts, ")
    assert printed.err.endswith(" tokens/s\n")


def test_json_is_one_line_per_prompt(capsys: pytest.CaptureFixture, llm: LLM):
    words = "--json --n 2 --max-tokens 5 --ignore-eos --logprobs 1".split()
    assert main(["generate", "one", "two", *words]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["one", "two"]
    for record in records:
        assert record["prompt_token_ids"] == llm.get_tokenizer().encode(record["prompt"])
        assert [len(output["token_ids"]) for output in record["outputs"]] == [5, 5]
        assert all(output["finish_reason"] == "length" for output in record["outputs"])
        assert len(record["outputs"][0]["logprobs"]) == 5
        assert 0 < record["ttft_seconds"] <= record["total_seconds"]


def test_prompts_come_from_a_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def prompts(*words: str) -> list[str]:
        assert main(["generate", "--json", "--max-tokens", "1", *words]) == 0
        return [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]

    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two\n")
    assert prompts("zero", "--prompts-file", str(file)) == ["zero", "one", " two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("three\n"))
    assert prompts("--prompts-file", "-") == ["three"]


def test_thinking_and_the_system_prompt_reach_the_template(capsys: pytest.CaptureFixture, llm: LLM):
    words = ["--json", "--max-tokens", "1", "--system-prompt", "Be brief.", "--no-thinking"]
    assert main(["generate", "Hello", *words]) == 0
    rendered = llm.get_tokenizer().decode(json.loads(capsys.readouterr().out)["prompt_token_ids"])
    assert "Be brief." in rendered
    assert rendered.rstrip().endswith("</think>")


def test_an_adapter_is_one_that_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, llm: LLM):
    asked = []
    monkeypatch.setattr(llm, "generate", lambda texts, params, *, adapter: asked.append((texts, adapter)) or [])
    with pytest.raises(ValueError, match="zip"):  # nothing is answered
        main(["generate", "Hello", "--lora-modules", "loud=x", "--adapter", "loud"])
    assert asked == [(["Hello"], "loud")]
    assert main(["generate", "Hello", "--lora-modules", "loud=x", "--adapter", "quiet"]) != 0
    assert "there is no adapter 'quiet'; there are loud" in capsys.readouterr().err
    assert main(["generate", "Hello", "--adapter", "quiet"]) != 0
    assert "--lora-modules gives none" in capsys.readouterr().err


def test_a_cut_completion_says_so(capsys: pytest.CaptureFixture):
    assert main(["generate", "one", "--max-tokens", "3", "--ignore-eos"]) == 0
    assert "(cut after 3 tokens)" in capsys.readouterr().out


def test_the_engine_gets_its_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.undo()  # a start of its own
    assert main(["generate", "one", "--json", "--max-tokens", "2", *FLAGS]) == 0
    assert len(json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]) <= 2
