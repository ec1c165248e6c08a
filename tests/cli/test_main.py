"""`jaxserve` as such: it finds commands, helps, and says in one line what the user has to mend."""

import subprocess
import sys
from pathlib import Path

import pytest

import jaxserve
from jaxserve.cli.main import COMMANDS, main
from jaxserve.server.config import ServerConfig

BAD = {
    "genrate": "there is no command 'genrate'; did you mean 'generate'?",
    "bench speed": "there is no command 'bench speed'",
    "generate hello --max-tokns 3": "there is no flag --max-tokns; did you mean '--max-tokens'?",
    "generate hello --model /no/such/model": "there is no model directory /no/such/model",
    "generate hello --top-p 2 --page-size x": "invalid int value: 'x'",
    "generate": "there is no prompt",
    "generate --prompts-file /no/such/file": "cannot read the prompts of /no/such/file",
    "chat --temperature -3": "temperature is -3.0",
    "serve --port http": "invalid int value: 'http'",
    "bench throughput --num-prompts 0": "'0' is no integer from 1 on",
    "bench latency --workload /no/such/file": "cannot read the workload /no/such/file",
    "bench latency --workload /no/such/file --input-len 3": "--input-len and --workload were both given",
    "bench latency --output-json /no/such/folder/a.json": "there is no folder for /no/such/folder/a.json",
    "env --jsn": "did you mean '--json'",
}


@pytest.mark.parametrize("words", BAD)
def test_an_error_is_one_line_and_exit_code_2(words: str, capsys: pytest.CaptureFixture):
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert BAD[words] in printed.err
    assert printed.err.startswith("jaxserve: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["chat --model /no/such/model", "generate --prompts-file -", "run-batch -i - -o /dev/null"]
)
def test_who_reads_a_closed_input_hears_of_it(
    words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", None)
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith("jaxserve: standard input is closed; ")


def test_a_closed_input_does_not_hinder_others():
    script = (
        "import socket\nfrom jaxserve.cli.main import main\n"
        "assert main([]) == 0\nassert socket.socket().fileno() > 2  # which a process that is started would lose\n"
    )
    subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&-', sys.executable, script], check=True, capture_output=True)


def test_who_closes_the_error_output_hears_of_no_error_and_nothing_else_is_lost():
    script = (
        "import subprocess, sys\nfrom jaxserve.cli.main import main\n"
        "assert main(['genrate']) == 2\nassert main(['--version']) == 0\nassert sys.stderr.fileno() == 2\n"
        "subprocess.run(['sh', '-c', 'echo of another process >&2'], check=True)\n"
    )
    closed = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, script], check=True, capture_output=True, text=True
    )
    assert closed.stdout == f"jaxserve {jaxserve.__version__}\n"


@pytest.mark.parametrize("words", ["env", "--version"])
def test_a_closed_output_is_refused(words: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main([words]) == 2
    assert capsys.readouterr().err.startswith("jaxserve: standard output is closed; ")


@pytest.mark.parametrize("words", ["env --json", "bench", "--version"])
@pytest.mark.parametrize("buffering", [1, -1], ids=["at once", "at the end"])
def test_a_full_disk_is_one_line_and_exit_code_1(
    words: str, buffering: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    with Path("/dev/full").open("w", buffering=buffering) as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(words.split()) == 1
    printed = capsys.readouterr().err
    assert "could not all be written (No space left on device)" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--help"], ["bench"], ["bench", "--help"]], ids=" ".join)
def test_the_overview_lists_commands(words: list[str], capsys: pytest.CaptureFixture):
    if "--help" in words:
        with pytest.raises(SystemExit):
            main(words)
    else:
        assert main(words) == 0
    printed = capsys.readouterr().out
    for command, (_, summary) in COMMANDS.items():
        assert (summary in printed) == (not words or words[0] != "bench" or command.startswith("bench"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_helps_with_an_example(command: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: jaxserve {command} ")
    assert f"examples:\n  jaxserve {command}" in printed


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"jaxserve {jaxserve.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_jax(command: str):
    script = (
        "import sys\nfrom jaxserve.cli.main import main\n"
        f"try:\n    main({[*command.split(), '--help']})\n"
        "finally:\n    assert 'jax' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_serve_passes_on_what_it_was_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from jaxserve.server import serve

    calls = []
    monkeypatch.setattr(serve, "run", lambda *configs: calls.append(configs))
    preset = tmp_path / "preset.yaml"
    preset.write_text("drain-timeout: 3\nmax_num_seqs: 2\nport: 1\n")
    words = f"serve --port 8123 --served-model-name demo --page-size 16 --config {preset}"
    assert main(words.split()) == 0
    ((config, server),) = calls
    assert config == jaxserve.EngineConfig(page_size=16, max_num_seqs=2)
    assert server == ServerConfig(port=8123, served_model_name="demo", drain_timeout=3)
