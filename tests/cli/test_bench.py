"""`jaxserve bench`: the arithmetic on made-up times, and its commands on tiny models."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from jaxserve import CompletionOutput, RequestOutput
from jaxserve.checkpoint.huggingface import read_config
from jaxserve.cli.bench import bandwidth, measurement
from jaxserve.cli.bench.bandwidth import decode_bandwidth
from jaxserve.cli.bench.measurement import Step, StepRecorder, request_times, step_times, summary, token_rates
from jaxserve.cli.main import main
from jaxserve.models.registry import model_config
from jaxserve.outputs import RequestMetrics
from jaxserve.runner.step_batch import DecodeArrays, StepBatch
from tests.models.cases import CASES, make_tensors, write_checkpoint

FLAGS = "--max-num-seqs 4 --max-num-batched-tokens 32 --max-model-len 64 --page-size 16".split()
UNTIED, TIED = "llama-2", "qwen3-tied-group-8-head-64"


def output(prompt: int, tokens: int, arrival: float, first: float, finished: float) -> RequestOutput:
    completion = CompletionOutput(0, token_ids=[1] * tokens, finish_reason="length")
    return RequestOutput("0", None, [1] * prompt, [completion], RequestMetrics(arrival, first, finished), finished=True)


def test_percentiles_interpolate():
    assert summary(range(101)) == {"mean": 50, "median": 50, "p95": 95, "p99": 99}
    assert summary([3.0, 1.0]) == pytest.approx({"mean": 2, "median": 2, "p95": 2.9, "p99": 2.98})
    assert summary([]) is None


def test_times_of_requests():
    times = request_times([output(5, 11, 1.0, 3.0, 8.0), output(5, 1, 1.0, 2.0, 2.0)])
    assert times["ttft_seconds"]["mean"] == 1.5
    assert times["tpot_seconds"] == {"mean": 0.5, "median": 0.5, "p95": 0.5, "p99": 0.5}  # one token has none after it
    assert times["end_to_end_seconds"]["mean"] == 4.0


def test_rates_count_all_requests_over_the_run():
    rates = token_rates([output(30, 10, 0, 1, 2), output(50, 10, 0, 1, 2)], seconds=4.0)
    assert (rates["prompt_tokens"], rates["output_tokens"]) == (80, 20)
    assert (rates["output_tokens_per_second"], rates["total_tokens_per_second"]) == (5.0, 25.0)
    assert rates["requests_per_second"] == 0.5


STEPS = [Step(False, 1.0, 2, 40, 0), Step(True, 0.25, 2, 2, 100), Step(True, 0.75, 1, 1, 50)]


def test_steps_are_told_apart():
    times = step_times(STEPS)
    assert (times["prefill"]["steps"], times["prefill"]["tokens"], times["prefill"]["seconds"]) == (1, 40, 1.0)
    assert (times["decode"]["steps"], times["decode"]["mean_rows"], times["decode"]["seconds"]) == (2, 1.5, 1.0)


def test_bandwidth_is_weights_and_live_positions_over_the_decode_steps():
    found = decode_bandwidth(STEPS, weight_bytes=1000, kv_bytes_per_token=10, memory_bytes_per_second=7000)
    assert found["bytes_per_step"] == 1000 + 10 * 75
    assert found["bytes_per_second"] == 2 * 1000 + 10 * 150
    assert found["share_of_memory_bandwidth"] == 0.5
    assert decode_bandwidth(STEPS[:1], weight_bytes=1, kv_bytes_per_token=1, memory_bytes_per_second=1) is None


@pytest.mark.parametrize(("windows", "read"), [((None,), 28), ((None, 6), (28 + 23) / 2), ((1,), 4)])
def test_the_recorder_counts_rows_and_positions(monkeypatch: pytest.MonkeyPatch, windows, read):
    clock = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: next(clock))
    positions = np.array([4, 9, -1, -1], np.int32)  # two rows, of 5 and 10 positions, and padding
    arrays = DecodeArrays.padding(4, max_num_seqs=4, groups=1)
    arrays.counts[:] = [3, 1, 0, 0]
    batch = StepBatch(arrays._replace(positions=positions, steps=np.int32(3)), [], [], 2)
    recorder = StepRecorder(windows)
    recorder.begin()
    recorder(batch)
    recorder(batch)
    assert recorder.steps == [Step(True, 0.5, 2, 4, read, 3), Step(True, 1.5, 2, 4, read, 3)]


def parameters_read(case: str) -> int:
    """All but an untied embedding table; the output layer's rows are padded to a multiple of 128."""
    tensors, config = make_tensors(case, seed=0), CASES[case]
    padding = -config["vocab_size"] % 128 * config["hidden_size"]
    unread = 0 if config["tie_word_embeddings"] else tensors["model.embed_tokens.weight"].size
    return sum(tensor.size for tensor in tensors.values()) - unread + padding


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "MIB_ON_CPU", 4)


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize(("command", "case"), [("throughput", UNTIED), ("latency", TIED)])
def test_a_run_prints_and_writes_its_numbers(command: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    model, file = write_checkpoint(case, tmp_path / "tiny"), tmp_path / "result.json"
    shape = {"throughput": ["--num-prompts", "6"], "latency": ["--batch-size", "2", "--num-iters", "3"]}[command]
    words = ["--input-len", "20", "--output-len", "5", "--output-json", str(file), "--model", str(model)]
    assert main(["bench", command, *shape, *words, *FLAGS]) == 0
    printed, report = capsys.readouterr().out, json.loads(file.read_text())

    assert report["benchmark"] == command
    assert report["compilations_after_warm_up"] == 0
    assert (report["requests"], report["prompt_tokens"], report["output_tokens"]) == (6, 120, 30)
    assert report["output_tokens_per_second"] == pytest.approx(30 / report["run_seconds"])
    assert report["settings"]["max_model_len"] == 64
    assert report["settings"]["dtype"] == "bfloat16"
    assert report["startup"]["compile_seconds"] == report["startup"]["stage_seconds"]["programs"]
    assert report["startup"]["programs_compiled"] > 0
    assert report["startup"]["attention"].startswith("attention runs in ")
    for name in ("ttft_seconds", "tpot_seconds", "end_to_end_seconds", "batch_seconds"):
        assert set(report[name]) == {"mean", "median", "p95", "p99"}
    steps = report["steps"]
    assert steps["prefill"]["tokens"] == 120
    assert steps["decode"]["tokens"] == 24  # each request's first token comes from its prompt
    assert 0 < steps["prefill"]["seconds"] + steps["decode"]["seconds"] < report["run_seconds"] + 0.01
    assert {"host", "devices", "versions", "workload", "model"} <= report.keys()

    config, decode = CASES[case], report["bandwidth"]["decode"]
    assert decode["weight_bytes_per_step"] == 2 * parameters_read(case)
    positions = sum(range(21, 25)) / 4  # what the four decode steps of a request attend to
    kv = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config.get("head_dim", 64)
    assert decode["kv_bytes_per_step"] == pytest.approx(kv * positions * steps["decode"]["mean_rows"])
    assert "output tokens per second" in printed
    assert "GB/s" in printed
    assert max(map(len, printed.splitlines())) < 130


@pytest.mark.usefixtures("small_probe")
def test_a_profile_opens_in_perfetto_and_xprof(tmp_path: Path):
    model, traces = write_checkpoint(TIED, tmp_path / "tiny"), tmp_path / "traces"
    words = "--batch-size 1 --num-iters 1 --input-len 20 --output-len 3".split()
    assert main(["bench", "latency", "--model", str(model), *words, "--profile", str(traces), *FLAGS]) == 0
    (perfetto,) = traces.rglob("perfetto_trace.json.gz")
    names = [event.get("name", "") for event in json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]]
    for program in ("jit(prefill)", "jit(decode)"):
        assert any(program in name for name in names), program
    (xprof,) = traces.rglob("*.xplane.pb")
    assert xprof.stat().st_size > 1000


def test_loading_is_measured_against_cat(tmp_path: Path, capsys: pytest.CaptureFixture):
    model, file = write_checkpoint(TIED, tmp_path / "tiny"), tmp_path / "result.json"
    words = ["--model", str(model), "--tensor-parallel-size", "4", "--num-iters", "2", "--output-json", str(file)]
    assert main(["bench", "load", *words]) == 0
    report = json.loads(file.read_text())
    assert report["file_bytes"] == (model / "model.safetensors").stat().st_size
    for name in ("cat", "load"):
        assert len(report[f"{name}_seconds"]) == 2
        assert report["bytes_per_second"][name] == report["file_bytes"] / min(report[f"{name}_seconds"])
    assert report["share_of_cat"] == min(report["cat_seconds"]) / min(report["load_seconds"])
    assert report["largest_shard_bytes"] == 2 * (4 + 2) * 64 * 72  # four heads, with a KV head of their own
    assert "% of cat" in capsys.readouterr().out


def test_experts_are_measured_by_how_many_are_used(tmp_path: Path, capsys: pytest.CaptureFixture):
    model, file = write_checkpoint("qwen3-moe", tmp_path / "tiny"), tmp_path / "result.json"
    words = ["--model", str(model), "--tokens", "2", "--tensor-parallel-size", "2", "--num-iters", "3"]
    assert main(["bench", "experts", *words, "--dtype", "bfloat16", "--output-json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [step["active_experts"] for step in report["steps"]] == [3, 6]  # of nine, three for each of two tokens
    assert report["expert_bytes"] == 2 * 3 * 80 * 40
    for step in report["steps"]:
        used = step["active_experts"] * report["expert_bytes"]
        assert step["bytes_per_second"] == pytest.approx(used / min(step["seconds"]))
    assert "2 tokens through 3 of 9 experts" in capsys.readouterr().out


def test_a_model_without_experts_is_refused(capsys: pytest.CaptureFixture):
    assert main(["bench", "experts"]) == 2
    assert "without experts" in capsys.readouterr().err


@pytest.mark.usefixtures("small_probe")
def test_contexts_are_measured_alone_and_beside_short_requests(tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "result.json"
    sizes = ["--length", "20", "--length", "100", "--output-len", "4", "--output-json", str(file)]
    words = [*sizes, "--max-num-batched-tokens", "32", "--page-size", "16"]
    assert main(["bench", "context", *words]) == 0
    report = json.loads(file.read_text())
    assert [row["prompt_tokens"] for row in report["alone"]] == [20, 100]
    assert report["settings"]["max_model_len"] == 104
    kv = 2 * 2 * 4 * 2 * 32  # bytes of a position in the demo model
    for row in report["alone"]:
        positions = sum(row["prompt_tokens"] + step for step in (1, 2, 3)) / 3
        assert row["decode"]["kv_bytes_per_step"] == pytest.approx(kv * positions)
    beside = report["beside"]
    assert beside["waits_seconds"]["p99"] > 0
    assert beside["waits_alone_seconds"]["p99"] > 0
    assert beside["short_tokens"] > 0
    assert report["temporary_bytes"] > 0
    printed = capsys.readouterr().out
    assert "of memory" in printed
    assert max(map(len, printed.splitlines())) < 130

    assert main(["bench", "context", *words, "--max-model-len", "50"]) == 2
    assert "takes 104 tokens" in capsys.readouterr().err


def test_bench_pages_counts_what_a_window_lets_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_checkpoint("gemma-3", tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    flags = ["--page-size", "16", "--max-num-batched-tokens", "64", "--output-json", str(tmp_path / "pages.json")]
    assert main(["bench", "pages", "--model", str(tmp_path), "--length", "32", "8192", "100000", *flags]) == 0
    short, long = json.loads((tmp_path / "pages.json").read_text())["rows"]
    assert (short["length"], long["length"]) == (32, 8192)  # the model has no positions for the third
    windows = [kind.window for kind in model_config(read_config(tmp_path)).layer_kinds]
    share = long["bytes"] / long["bytes_without_windows"]
    assert windows.count(None) / len(windows) < share < windows.count(None) / len(windows) + 0.1
    assert "that keep everything" in capsys.readouterr().out


def test_streams_over_http_are_measured_and_compared_with_the_same_requests_offline(
    tmp_path: Path, capfd: pytest.CaptureFixture
):
    file = tmp_path / "result.json"
    words = "--streams 2 --num-prompts 3 --input-len 20 --output-len 9 --compare-offline".split()
    assert main(["bench", "serve", *words, "--output-json", str(file), *FLAGS]) == 0
    report = json.loads(file.read_text())
    assert (report["requests"], report["prompt_tokens"], report["output_tokens"]) == (3, 60, 27)
    assert report["output_tokens_per_second"] == pytest.approx(27 / report["run_seconds"])
    for name in ("ttft_seconds", "itl_seconds", "tpot_seconds", "end_to_end_seconds"):
        assert 0 < report[name]["median"] <= report["run_seconds"]
    assert (report["offline"]["prompt_tokens"], report["offline"]["output_tokens"]) == (60, 27)
    ratio = report["output_tokens_per_second"] / report["offline"]["output_tokens_per_second"]
    assert report["share_of_offline"] == ratio
    assert f"{ratio:.1%}" in capfd.readouterr().out


def test_a_server_that_is_not_there_or_does_not_answer_to_the_end_is_told(capsys: pytest.CaptureFixture):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "no server of OpenAI's API answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", "--compare-offline"]) == 2
    assert "--url and --compare-offline were both given" in capsys.readouterr().err


def test_constrained_requests_are_measured_beside_free_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    sizes = ["--requests", "2", "--input-len", "8", "--output-len", "12", "--rounds", "2", "--output-json", str(file)]
    assert main(["bench", "structured", *sizes, "--max-num-batched-tokens", "32", "--page-size", "16"]) == 0
    report = json.loads(file.read_text())
    assert set(report["tpot_seconds"]) == {"alone", "beside free", "beside constrained"}
    assert all(found["median"] > 0 for found in report["tpot_seconds"].values())
    assert (report["settings"]["max_num_seqs"], report["settings"]["max_model_len"]) == (4, 20)
    printed = capsys.readouterr().out
    for row in ("2 free, alone", "2 free, beside 2 free", "2 free, beside 2 constrained", "than beside free ones"):
        assert row in printed
    assert max(map(len, printed.splitlines())) < 130

    assert main(["bench", "structured", "--output-len", "1"]) == 2
    assert "fewer than two tokens" in capsys.readouterr().err
