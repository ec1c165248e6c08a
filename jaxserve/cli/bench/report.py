"""A benchmark's report as tables."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jaxserve.cli.bench.measurement import PERCENTILES

_STATISTICS = ("mean", *PERCENTILES)


def print_report(title: str, report: dict[str, Any]) -> None:
    startup, memory = report["startup"], report["bandwidth"]["memory"]
    console = Console(highlight=False)
    console.print(f"\n[bold]{title}[/bold]\n{_subject(report)}", soft_wrap=True)
    rates = _rates(report)
    rates.add_row("programs compiled during the run", str(report["compilations_after_warm_up"]))
    console.print(rates)
    console.print(_times(report))
    console.print(_host(report))
    console.print(_startup(report))
    console.print(f"  {startup['programs_compiled']} programs, {startup['of_these_from_cache']} of them from the cache")
    console.print(_bandwidth(report))
    console.print(f"  Bandwidth was measured as {memory['probe']}.", soft_wrap=True)
    console.print("  Pages that sequences share count for each of them, though they may be read once.", soft_wrap=True)


def print_served(report: dict[str, Any]) -> None:
    """What `jaxserve bench serve` found."""
    console = Console(highlight=False)
    prompt, output = (report[name] / report["requests"] for name in ("prompt_tokens", "output_tokens"))
    console.print(
        f"\n[bold]serve[/bold]\n{report['model']}, {report['requests']} requests of {prompt:.0f} prompt tokens and "
        f"{output:.0f} output tokens, {report['streams']} at the same time",
        soft_wrap=True,
    )
    rates = _rates(report)
    if offline := report.get("offline"):
        rates.add_row("output tokens per second offline", f"{offline['output_tokens_per_second']:.1f}")
        rates.add_row("share of that over HTTP", f"{report['share_of_offline']:.1%}")
    console.print(rates)
    table = statistics_table("milliseconds")
    for name, seconds in (
        ("time to first token (TTFT)", report["ttft_seconds"]),
        ("between arrivals of text (ITL)", report["itl_seconds"]),
        ("time per output token (TPOT)", report["tpot_seconds"]),
        ("request from sending to end", report["end_to_end_seconds"]),
    ):
        if seconds:
            table.add_row(name, *(milliseconds(seconds[statistic]) for statistic in _STATISTICS))
    console.print(table)


def _subject(report: dict[str, Any]) -> str:
    settings, work, device = report["settings"], report["workload"], report["devices"][0]
    host = f"CPU, {report['host']['cores']} cores of {report['host']['cpu']}"
    where = host if device["platform"] == "cpu" else f"{settings['tensor_parallel_size']} × {device['kind']}"
    times = f"{work['batches']} × " if work["batches"] > 1 else ""
    requests = f"{work['requests_per_batch']} request{'s' * (work['requests_per_batch'] > 1)}"
    return (
        f"{Path(report['model']).name}, {settings['dtype']}, on {where}\n"
        f"{times}{requests} of {work['mean_prompt_tokens']:.0f} prompt tokens and "
        f"{work['mean_output_tokens']:.0f} output tokens, {Path(work['source']).name}"
    )


def table_of(*columns: str, first_width: int = 32) -> Table:
    """A table of these columns, the first one's entries names and the others' numbers."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(columns[0], min_width=first_width, no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, min_width=8, justify="right", no_wrap=True)
    return table


def statistics_table(title: str) -> Table:
    """A table whose rows are statistics as `measurement.summary` gives them."""
    return table_of(title, *_STATISTICS)


def _rates(report: dict[str, Any]) -> Table:
    table = table_of("run", "")
    table.add_row("seconds", f"{report['run_seconds']:.2f}")
    table.add_row("requests per second", f"{report['requests_per_second']:.2f}")
    table.add_row("output tokens per second", f"{report['output_tokens_per_second']:.1f}")
    table.add_row("total tokens per second", f"{report['total_tokens_per_second']:.1f}")
    return table


def _times(report: dict[str, Any]) -> Table:
    table = statistics_table("milliseconds")
    for name, seconds in (
        ("time to first token (TTFT)", report["ttft_seconds"]),
        ("time per output token (TPOT)", report["tpot_seconds"]),
        ("request from arrival to end", report["end_to_end_seconds"]),
        ("batch", report["batch_seconds"] if report["workload"]["batches"] > 1 else None),
        ("prefill step", report["steps"]["prefill"]["step_seconds"]),
        ("decode step", report["steps"]["decode"]["step_seconds"]),
    ):
        if seconds:
            table.add_row(name, *(milliseconds(seconds[statistic]) for statistic in _STATISTICS))
    return table


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, in a table."""
    return f"{1000 * seconds:.2f}" if seconds < 1 else f"{1000 * seconds:.0f}"


_HOST = {
    "schedule": "scheduling",
    "pack": "packing the batch",
    "dispatch": "dispatching it",
    "wait": "waiting for the device and reading back",
    "take": "taking tokens and making text",
}


def _host(report: dict[str, Any]) -> Table:
    table = table_of("the engine's thread", "ms a step", "share")
    steps = sum(kind["steps"] for kind in report["steps"].values())
    total = sum(report["host_seconds"].values())
    for name, seconds in report["host_seconds"].items():
        table.add_row(_HOST[name], milliseconds(seconds / steps), f"{seconds / total:.1%}")
    return table


def _startup(report: dict[str, Any]) -> Table:
    table = table_of("start-up", "seconds")
    for stage, seconds in report["startup"]["stage_seconds"].items():
        table.add_row("compiling programs" if stage == "programs" else stage, f"{seconds:.2f}")
    table.add_row("total", f"{report['startup']['seconds']:.2f}")
    return table


def _bandwidth(report: dict[str, Any]) -> Table:
    memory, decode = report["bandwidth"]["memory"], report["bandwidth"]["decode"]
    table = table_of("bytes that a pass of decode reads", "")
    if decode:
        steps = report["steps"]["decode"]
        table.add_row("passes, of sequences (mean)", f"{steps['passes']}, of {steps['mean_rows']:.1f}")
        table.add_row("weights", f"{decode['weight_bytes_per_step'] / 1e6:.1f} MB")
        table.add_row("keys and values (mean)", f"{decode['kv_bytes_per_step'] / 1e6:.1f} MB")
        table.add_row("both, over the step's time", f"{decode['bytes_per_second'] / 1e9:.2f} GB/s")
    table.add_row("this memory's bandwidth", f"{memory['bytes_per_second'] / 1e9:.2f} GB/s")
    if decode:
        table.add_row("share of it", f"{100 * decode['share_of_memory_bandwidth']:.1f} %")
    return table
