"""The engine on the shape of Qwen3-8B with random weights: what it reaches of the machine, and what the host costs.

Device times are of batches made beforehand and dispatched one behind the other, each waiting for none; the engine's
own steps, beside them, schedule, pack and read tokens on the host. What they take longer is the host's gap.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxserve import LLM, EngineConfig, SamplingParams
from jaxserve.engine.engine import Engine
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Chunk, Decode, Prefill
from jaxserve.engine.startup import WEIGHTS, load
from jaxserve.layers.quantisation import KINDS
from jaxserve.runner.compilation import compilations
from jaxserve.runner.step_batch import StepBatch
from scripts.gpu import ceilings
from scripts.gpu.case import Case, Clock, NotRun, Row, Table
from scripts.gpu.timing import on_gpu, queued_seconds

facts = ceilings.facts

ADAPTERS, RANK = 8, 16

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
TOY = QWEN3_8B | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}

START = Table("start", "Start", {"total": "s", "weights": "s", "compiling": "s", "programs": "", "from cache": ""})
ATTENTION = Table("attention", "What runs attention", {"chosen": ""})
CHECK = Table("answer", "The demo model, end to end", {"answer": "", "ok": ""})
DECODE = Table(
    "decode steps",
    "Decode steps on the device, Qwen3-8B's shape",
    {"time": "ms", "dispatch": "ms", "tokens/s": "", "read": "GB", "GB/s": "", "share": "%"},
    "Read are all weights once and each row's keys and values; dispatch is the host's time for one call.",
)
PREFILL = Table(
    "prefill steps", "Prefill steps on the device", {"time": "ms", "tokens/s": "", "TFLOP/s": "", "share": "%"}
)
HOST = Table(
    "host",
    "Decoding as the engine drives it, beside single steps on the device alone",
    {"engine": "ms", "device": "ms", "gap": "ms", "gap share": "%"},
    "Time is for a token of each sequence: the engine's steps may bring several. No text is made of the tokens.",
)
GRAPHS = Table(
    "graphs",
    "CUDA graphs in the largest decode program",
    {"graphs": "", "kernels in": "", "outside": "", "loops": "", "branches": ""},
    "As XLA lists its program. Kernels outside are also those of branches that a greedy step skips.",
)
TRACE = Table("trace", "CUDA calls of one decode step, from a trace", {"graph launches": "", "kernel launches": ""})
THROUGHPUT = Table(
    "throughput",
    "Offline throughput, greedy, all requests at once",
    {"requests": "", "done": "", "seconds": "s", "output tok/s": "", "all tok/s": "", "compiled": ""},
)


class Sizes(NamedTuple):
    config: dict[str, Any]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    decode: list[tuple[int, int]]  # batch and context
    prefill: list[int]
    hosts: list[int]
    throughput: tuple[int, int, int]  # requests, prompt tokens, output tokens

    def fewer(self) -> "Sizes":
        """What shows the cost of reading other or more weights, with fewer programs to compile."""
        seqs = min(64, self.max_num_seqs)
        decode = [(batch, context) for batch, context in self.decode[:3] if batch in (1, seqs)]
        return self._replace(
            max_num_seqs=seqs, max_num_batched_tokens=min(512, self.max_num_batched_tokens), decode=decode
        )


def sizes() -> Sizes:
    if not on_gpu():
        return Sizes(TOY, 4, 32, 128, 16, [(1, 32), (4, 64)], [32], [1, 4], (6, 20, 10))
    steps = [(1, 1024), (8, 1024), (64, 1024), (256, 1024), (64, 8192), (1, 32_768)]
    return Sizes(QWEN3_8B, 256, 8192, 40_960, 64, steps, [8192, 2048], [1, 8, 64, 256], (256, 1000, 1000))


def cases(clock: Clock, known: dict[str, float], folder: Path) -> Iterator[Case]:
    best = ceilings.rates(known)  # now: later the engine has all memory
    run = _Run(sizes(), clock, best, folder)
    yield Case(CHECK, "What is 27+45?", partial(_demo, run.cache), limit=100)
    yield Case(START, "nothing in the compile cache", run.start, limit=400)
    yield Case(ATTENTION, "", lambda: {"chosen": run.engine.attention})
    for batch, context in run.sizes.decode:
        name = f"batch {batch}, context {context:,}"
        yield Case(DECODE, name, partial(run.decode_step, batch, context))
    for tokens in run.sizes.prefill:
        yield Case(PREFILL, f"{tokens:,} tokens of one prompt", partial(run.prefill_step, tokens))
    for batch in run.sizes.hosts:
        yield Case(HOST, f"batch {batch}", partial(run.host_gap, batch))
    yield Case(GRAPHS, "by XLA's own listing", graphs_in_dump)
    yield Case(TRACE, "by CUPTI", run.trace)
    requests, prompt, output = run.sizes.throughput
    yield Case(
        THROUGHPUT, f"{prompt:,} in, {output:,} out", partial(run.throughput, requests, prompt, output), limit=400
    )
    yield Case(START, "everything in the compile cache", run.start, limit=400)
    run.close()
    fewer = run.sizes.fewer()
    variants: dict[str, dict[str, Any]] = {f"{kind} weights": {"quantization": kind} for kind in KINDS}
    variants[f"{ADAPTERS} adapters of rank {RANK}"] = {"lora_modules": _write_adapters(fewer.config, folder)}
    for variant, settings in variants.items():
        run = _Run(fewer, clock, best, folder, **settings)
        for batch, context in fewer.decode:
            name = f"{variant}, batch {batch}, context {context:,}"
            yield Case(DECODE, name, partial(run.decode_step, batch, context), limit=400)  # the first starts the engine
        run.close()


def _write_adapters(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Some for all linear layers of that model, as `lora_modules` takes them. Speed does not depend on the numbers."""
    random = np.random.default_rng(0)
    heads, kv_heads, head_dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    hidden, width = config["hidden_size"], config["intermediate_size"]
    attention = {
        "q": (heads * head_dim, hidden),
        "k": (kv_heads * head_dim, hidden),
        "v": (kv_heads * head_dim, hidden),
    }
    shapes = {f"self_attn.{name}_proj": shape for name, shape in attention.items()}
    shapes |= {"self_attn.o_proj": (hidden, heads * head_dim), "mlp.down_proj": (hidden, width)}
    shapes |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden)}
    tensors = {}
    for module, (out, into) in shapes.items():
        down, up = (random.normal(0, 0.02, shape).astype(ml_dtypes.bfloat16) for shape in ((RANK, into), (out, RANK)))
        for layer in range(config["num_hidden_layers"]):
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return tuple(f"{number}={adapter}" for number in range(ADAPTERS))


def _demo(cache: str) -> Row:
    params = SamplingParams(temperature=0, max_tokens=200)
    small = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 256}
    with LLM(progress=False, compilation_cache_dir=cache, **small) as llm:
        answer = llm.chat([{"role": "user", "content": "What is 27+45?"}], params)[0].outputs[0].text
    answer = answer.rpartition("</think>")[2].strip()
    return {"answer": answer[:40], "ok": "72" in answer}


class _Run:
    """One engine, started when the first case needs it, and what is measured on it."""

    def __init__(self, sizes: Sizes, clock: Clock, best: dict[str, float], folder: Path, **settings: Any):
        self.sizes, self._clock, self._best = sizes, clock, best
        self._settings = settings  # further ones of the engine
        self._model = folder / "model"
        self._model.mkdir(exist_ok=True)
        (self._model / "config.json").write_text(json.dumps(sizes.config))
        self.cache = str(folder / "programs")  # JAX has one in a process: the demo model's programs go there too
        self._engine: Engine | None = None
        self._broken: Exception | None = None
        self._batches = 0

    def start(self) -> Row:
        """Start the engine; the second time it finds its programs compiled."""
        self.close()
        compiled, cached = compilations.count, compilations.cached + compilations.loaded
        begin = time.perf_counter()
        engine = self._start()
        row = {"total": time.perf_counter() - begin, "weights": engine.startup_seconds[WEIGHTS]}
        row["compiling"] = engine.startup_seconds["programs"]
        return row | {
            "programs": compilations.count - compiled,
            "from cache": compilations.cached + compilations.loaded - cached,
        }

    def close(self) -> None:
        if self._engine:
            self._engine.close()
        self._engine = None

    @property
    def engine(self) -> Engine:
        """The engine, started anew in a process that begins behind the case that starts it."""
        if self._broken:
            raise NotRun("the engine did not start")
        return self._engine or self._start()

    def _start(self) -> Engine:
        s = self.sizes
        config = EngineConfig(
            **self._settings,
            model=str(self._model),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=s.max_model_len,
            max_num_seqs=s.max_num_seqs,
            max_num_batched_tokens=s.max_num_batched_tokens,
            page_size=s.page_size,
            compilation_cache_dir=self.cache,
        )
        try:
            self._engine = Engine(load(config, lambda stage, done, total: None))
        except Exception as error:
            self._broken = error
            raise
        self._fill_pages()
        return self._engine

    def _fill_pages(self) -> None:
        """Numbers other than zero into the page pool, in place: there is no room for a second one."""

        def values(pages: jax.Array) -> jax.Array:
            return ceilings.random_values(1, pages.shape).astype(pages.dtype)

        fill = jax.jit(values, donate_argnums=0, keep_unused=True)
        state = self.engine.runner.state
        cache = state.cache._replace(k=tuple(map(fill, state.cache.k)), v=tuple(map(fill, state.cache.v)))
        self.engine.runner.state = state._replace(cache=cache)

    def _place(self, batch: int, context: int) -> StepBatch:
        """Give the first `batch` slots pages for `context` tokens, and return the step that decodes all of them."""
        runner, config = self.engine.runner, self.engine.config
        each = -(-context // config.page_size)
        if batch * each > config.num_pages:
            raise NotRun(f"its keys and values take {batch * each:,} pages, and the pool has {config.num_pages:,}")
        slots = runner.state.slots
        tables = np.full(slots.page_tables.shape, -1, np.int32)
        tables[0, :batch, :each] = (
            np.random.default_rng(0).permutation(config.num_pages)[: batch * each].reshape(batch, each)
        )
        slots = slots._replace(page_tables=jax.device_put(tables, slots.page_tables.sharding))
        runner.state = runner.state._replace(slots=slots)
        rows = np.arange(batch, dtype=np.int32)
        ones = np.ones(batch, np.int32)
        return self.engine.builder.build(Decode([], rows, (context - 1) * ones, ones, -ones[None], steps=1, needs=0))

    @staticmethod
    def _request(prompt: list[int], slot: int) -> Request:
        return Request("0", prompt, SamplingParams(temperature=0), seed=0, max_tokens=1, arrival=0, slot=slot)

    def _device_seconds(self, batch: StepBatch) -> float:
        return queued_seconds(lambda: self.engine.runner.dispatch(batch).token_ids, total=0.5)

    def decode_step(self, batch: int, context: int) -> Row:
        step, runner = self._place(batch, context), self.engine.runner
        seconds = self._device_seconds(step)
        jax.block_until_ready(runner.state)
        start = time.perf_counter()
        for _ in range(8):
            runner.dispatch(step)
        dispatch = (time.perf_counter() - start) / 8
        read = runner.weight_bytes_per_step + runner.kv_bytes_per_token * batch * context
        return {
            "time": seconds * 1e3,
            "dispatch": dispatch * 1e3,
            "tokens/s": batch / seconds,
            "read": read / 1e9,
            "GB/s": read / seconds / 1e9,
            "share": 100 * read / seconds / self._best["read"],
        }

    def prefill_step(self, tokens: int) -> Row:
        config, model = self.engine.config, self.engine.model_config
        prompt = np.random.default_rng(0).integers(model.vocab_size, size=tokens).tolist()
        request = self._request(prompt, slot=0)
        request.pages = [list(range(-(-tokens // config.page_size)))]
        batch = self.engine.builder.build(Prefill([Chunk(request, 0, tokens, samples=True, first=True)]))
        seconds = self._device_seconds(batch)
        # Two operations a weight and token but in the head, which sees one token; four for what a query sees of a key.
        projections = (model.num_heads * 2 + model.num_kv_heads * 2) * model.head_dim + 3 * model.intermediate_size
        products = 2 * tokens * model.num_layers * model.hidden_size * projections
        attention = 4 * model.num_layers * model.num_heads * model.head_dim * tokens * (tokens + 1) // 2
        rate = (products + attention + 2 * model.hidden_size * model.vocab_size) / seconds
        share = 100 * rate / self._best["product"]
        return {"time": seconds * 1e3, "tokens/s": tokens / seconds, "TFLOP/s": rate / 1e12, "share": share}

    def host_gap(self, batch: int) -> Row:
        """The engine decodes `batch` requests; then the same step runs on the device alone, at the same context."""
        prompt, steps = (128, 40) if on_gpu() else (16, 4)
        self._add(batch, prompt, 1000 if on_gpu() else 100)
        try:
            begun: set[str] = set()
            while len(begun) < batch:  # until every prompt is done and all decode
                begun.update(delta.request_id for delta in self._step())
            tokens, start = 0, time.perf_counter()
            for _ in range(steps):
                tokens += sum(len(completion.token_ids) for delta in self._step() for completion in delta.outputs)
            seconds = (time.perf_counter() - start) * batch / tokens
        finally:
            self._drop(batch)
        device = self._device_seconds(self._place(batch, prompt + tokens // batch))
        gap = seconds - device
        return {"engine": seconds * 1e3, "device": device * 1e3, "gap": gap * 1e3, "gap share": 100 * gap / seconds}

    def _add(self, count: int, prompt: int, output: int) -> None:
        self._batches += 1  # other prompts each time: none is found in the prefix cache
        rng, vocabulary = np.random.default_rng(self._batches), self.engine.model_config.vocab_size
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        for index in range(count):
            ids = rng.integers(vocabulary, size=prompt).tolist()
            checked = self.engine.inputs.check({"prompt_token_ids": ids}, params)
            self.engine.add(checked, params, request_id=str(index))

    def _step(self) -> list:
        if self._clock.left <= 0:
            raise NotRun("the budget ended while it ran")
        return self.engine.step()

    def _drop(self, count: int) -> None:
        for index in range(count):
            self.engine.abort(str(index))
        self.engine.step()  # takes the step that was under way

    def throughput(self, requests: int, prompt: int, output: int) -> Row:
        """All requests from start to end, or as far as the budget goes."""
        engine = self.engine
        compiled, start = compilations.count, time.perf_counter()
        self._add(requests, prompt, output)
        tokens = done = 0
        first: set[str] = set()
        while engine.has_unfinished and self._clock.left > 0:
            for delta in engine.step():
                tokens += sum(len(completion.token_ids) for completion in delta.outputs)
                first.add(delta.request_id)
                done += delta.finished
        seconds = time.perf_counter() - start
        self._drop(requests)
        return {
            "requests": requests,
            "done": done,  # fewer than all: the budget ended
            "seconds": seconds,
            "output tok/s": tokens / seconds,
            "all tok/s": (tokens + prompt * len(first)) / seconds,
            "compiled": compilations.count - compiled,
        }

    def trace(self) -> Row:
        """Launches of graphs and of single kernels while three decode steps run under the profiler."""
        if not on_gpu():
            raise NotRun("there are none on a CPU")
        step, count = self._place(self.sizes.max_num_seqs, 128), 3
        jax.block_until_ready(self.engine.runner.dispatch(step).token_ids)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(count):
                    result = self.engine.runner.dispatch(step).token_ids
                jax.block_until_ready(result)
            names = list(_event_names(folder))
        graphs = sum("GraphLaunch" in name for name in names)
        kernels = sum(bool(re.search(r"cu(da)?LaunchKernel", name)) for name in names)
        if not graphs + kernels:
            raise NotRun("the trace holds no CUDA calls")
        return {"graph launches": graphs / count, "kernel launches": kernels / count}


def _event_names(folder: str) -> Iterator[str]:
    for file in Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                yield from (event.name for event in line.events)


def graphs_in_dump() -> Row:
    """What XLA says it runs for the largest decode program: `xla_dump_to` lists its thunks, graphs among them."""
    found = re.search(r"--xla_dump_to=(\S+)", os.environ.get("XLA_FLAGS", ""))
    listings = list(Path(found[1]).glob("*thunk_sequence_after_thunk_passes.txt")) if found else []
    if not listings:
        raise NotRun("XLA has listed no thunks; it does on a GPU, when it compiles")
    return count_graphs(max(listings, key=lambda file: file.stat().st_size).read_text())


def count_graphs(listing: str) -> Row:
    """Graphs, and kernels inside and outside of them, in a listing of one thunk a line, indented below its owner."""
    row = {"graphs": 0, "kernels in": 0, "outside": 0, "loops": 0, "branches": 0}
    inside: int | None = None  # the indentation of the graph that the lines belong to
    for line in listing.splitlines():
        thunk = re.match(r"( *)\d+: k(\w+)", line)
        if not thunk:
            continue
        indentation, kind = len(thunk[1]), thunk[2]
        if inside is not None and indentation <= inside:
            inside = None
        if kind == "CommandBuffer":
            inside = indentation
            row["graphs"] += 1
        elif kind in ("While", "Conditional"):
            row["loops" if kind == "While" else "branches"] += 1
        else:
            row["outside" if inside is None else "kernels in"] += 1
    return row
