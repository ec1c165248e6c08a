"""A benchmark's report as tables."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxserve.cli.bench.measurement import PERCENTILES


def print_report(title: str, report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"\n[bold]{title}[/bold]", _subject(report), sep=": ", soft_wrap=True)
    for table in (_rates(report), _times(report), _startup(report), _bandwidth(report)):
        console.print(table)


def _subject(report: dict[str, Any]) -> str:
    settings, devices, work = report["settings"], report["devices"], report["workload"]
    device = (
        devices[0]["kind"]
        if devices[0]["platform"] != "cpu"
        else f"{report['host']['cores']} cores of {report['host']['cpu']}"
    )
    batches = f"{work['batches']} × " if work["batches"] > 1 else ""
    source = "random token ids" if work["source"] == "random token ids" else Path(work["source"]).name
    return (
        f"{Path(report['model']).name}, {settings['dtype']}, {settings['tensor_parallel_size']} × {device}\n"
        f"{batches}{work['requests_per_batch']} requests of {work['mean_prompt_tokens']:.0f} prompt tokens and "
        f"{work['mean_output_tokens']:.0f} output tokens, {source}"
    )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _rates(report: dict[str, Any]) -> Table:
    table = _table("run", "")
    table.add_row("seconds", f"{report['run_seconds']:.2f}")
    table.add_row("requests per second", f"{report['requests_per_second']:.2f}")
    table.add_row("output tokens per second", f"{report['output_tokens_per_second']:.1f}")
    table.add_row("total tokens per second", f"{report['total_tokens_per_second']:.1f}")
    table.add_row("programs compiled during the run", str(report["compilations_after_warm_up"]))
    return table


def _times(report: dict[str, Any]) -> Table:
    table = _table("milliseconds", "mean", *PERCENTILES)
    for name, values in (
        ("time to first token (TTFT)", report["ttft_seconds"]),
        ("time per output token (TPOT)", report["tpot_seconds"]),
        ("request from arrival to end", report["end_to_end_seconds"]),
        ("batch", report["batch_seconds"] if report["workload"]["batches"] > 1 else None),
        ("prefill step", report["steps"]["prefill"]["step_seconds"]),
        ("decode step", report["steps"]["decode"]["step_seconds"]),
    ):
        if values:
            table.add_row(name, *(f"{1000 * values[column]:.2f}" for column in ("mean", *PERCENTILES)))
    return table


def _startup(report: dict[str, Any]) -> Table:
    startup = report["startup"]
    table = _table("start-up", "seconds")
    for stage, seconds in startup["stage_seconds"].items():
        table.add_row(stage, f"{seconds:.2f}")
    table.add_row("total", f"{startup['seconds']:.2f}")
    cached = startup["of_these_from_cache"]
    table.caption = f"{startup['programs_compiled']} programs compiled, {cached} of them read from the cache"
    table.caption_justify = "left"
    return table


def _bandwidth(report: dict[str, Any]) -> Table:
    memory, decode = report["bandwidth"]["memory"], report["bandwidth"]["decode"]
    table = _table("memory, in a decode step", "")
    if decode:
        steps = report["steps"]["decode"]
        table.add_row("steps", str(steps["steps"]))
        table.add_row("sequences, mean", f"{steps['mean_rows']:.1f}")
        table.add_row("weights read", f"{decode['weight_bytes_per_step'] / 1e6:.1f} MB")
        table.add_row("keys and values read, mean", f"{decode['kv_bytes_per_step'] / 1e6:.1f} MB")
        table.add_row("both over the step's time", f"{decode['bytes_per_second'] / 1e9:.2f} GB/s")
    table.add_row("this memory's bandwidth, measured", f"{memory['bytes_per_second'] / 1e9:.2f} GB/s")
    if decode:
        table.add_row("share of it", f"{100 * decode['share_of_memory_bandwidth']:.1f} %")
    table.caption, table.caption_justify = f"Measured as {memory['probe']}.", "left"
    return table
