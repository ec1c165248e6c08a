"""From settings to a runner that is ready: model, mesh, weights, pages, programs."""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.chat.format import ChatFormat
from jaxserve.checkpoint.adapters import Adapters
from jaxserve.checkpoint.huggingface import abstract_model
from jaxserve.checkpoint.random_weights import random_weights
from jaxserve.checkpoint.tokenizer import eos_token_ids, load_tokenizer, read_generation_config, sampling_defaults
from jaxserve.config import EngineConfig, ResolvedConfig
from jaxserve.engine.input_processor import Limits, chat_format
from jaxserve.engine.served_model import served_model
from jaxserve.engine.sizes import ON_CPU, ON_GPU, Sizes, sizes_of
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.parallel.mesh import make_mesh, placed_shapes
from jaxserve.parallel.processes import Processes, join
from jaxserve.runner.buckets import MIN_DECODE_ROWS, TILE_SIZE, Buckets
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.memory import array_bytes, plan_pages, reserve_gpu_memory
from jaxserve.runner.program_cache import sources_digest
from jaxserve.runner.runner import Runner
from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.implementations import MOSAIC_GPU, NATIVE, is_hopper
from pallas_kernels.matmul import products_run_natively
from pallas_kernels.paged_attention import choose_decode, choose_prefill

WEIGHTS = "weights, at the same time"  # the stage that programs are compiled beside

OnProgress = Callable[[str, int, int], None]  # stage, done, total


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What an engine runs on."""

    config: ResolvedConfig
    model_config: ModelConfig
    tokenizer: Any
    chat: ChatFormat | None  # where there is a tokenizer
    eos_token_ids: frozenset[int]
    sampling_defaults: dict[str, Any]
    buckets: Buckets
    cache_layout: CacheLayout
    runner: Runner
    attention: str  # what runs attention, and why
    seconds: dict[str, float]  # by stage
    adapters: Adapters | None = None
    processes: Processes = dataclasses.field(default_factory=Processes)

    @property
    def limits(self) -> Limits:
        """What the engine takes."""
        return Limits(
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.config.max_model_len,
            max_logprobs=min(self.config.max_logprobs, self.model_config.vocab_size),
            eos_token_ids=self.eos_token_ids,
            adapters=self.config.adapters,
        )


def load(config: EngineConfig, on_progress: OnProgress) -> Loaded:
    """Load and compile everything; `InputError` for a checkpoint or a setting that cannot be served.

    Of several processes each calls it, and has what the first one's `config` says.
    """
    reserve_gpu_memory(config.gpu_memory_utilization)  # before JAX starts
    if config.num_processes == 1 or config.coordinator_address is None:
        return _load(config, Processes(), on_progress)
    processes = join(config.coordinator_address, config.num_processes, config.process_id)
    try:
        first, *_ = processes.gather(config)
        return _load(dataclasses.replace(first, process_id=config.process_id), processes, on_progress)
    except BaseException as error:
        what = str(error) if isinstance(error, InputError) else type(error).__name__
        processes.leave(f"cannot start: {what}")
        raise


def _load(config: EngineConfig, processes: Processes, on_progress: OnProgress) -> Loaded:
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def stage_done(name: str) -> None:
        nonlocal start
        seconds[name], start = time.perf_counter() - start, time.perf_counter()

    files, hf, model, dtype = served_model(config, with_weights=config.load_format != "dummy")
    generation = read_generation_config(files.config)
    eos, defaults = eos_token_ids(generation, hf), sampling_defaults(generation)
    model = model.served_up_to(config.max_model_len or model.max_position_embeddings)
    tokenizer_path = None if config.skip_tokenizer_init else config.tokenizer or str(files.config)
    tokenizer = load_tokenizer(Path(tokenizer_path)) if tokenizer_path is not None else None
    if tokenizer is not None and len(tokenizer) > model.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.vocab_size}; they do not belong together"
        )
    chat = chat_format(tokenizer, config)
    stage_done("configuration and tokenizer")

    mesh = make_mesh(config.tensor_parallel_size, of_all_processes=processes.count > 1)
    placed = model.over_tensor_axis(config.tensor_parallel_size)
    attention, mixed = _attention(config, placed, dtype, mesh.devices)
    graph, shapes = abstract_model(placed, dtype)
    shapes = placed_shapes(mesh, shapes)
    named = dataclasses.replace(config, model=files.name, tokenizer=tokenizer_path)
    room = {"places": config.max_loras, "rank": config.max_lora_rank}
    adapters = Adapters(config.adapters, model, mesh, dtype, **room)
    weight_bytes = array_bytes(shapes) + array_bytes(adapters.shapes)
    resolved, buckets, layout = _resolve(named, placed, weight_bytes, mesh, processes, dtype, mixed=mixed)
    _check_alike(processes, placed, buckets, layout, attention)
    runner = Runner(
        graph,
        shapes,
        adapters,
        placed,
        mesh,
        processes,
        buckets,
        layout,
        num_pages=resolved.num_pages,
        max_logprobs=resolved.max_logprobs,
        max_decode_steps=resolved.max_decode_steps,
        attention_backend=resolved.attention_backend,
        compilation_cache_dir=resolved.compilation_cache_dir,
    )
    stage_done("plan of pages and programs")

    # Programs are compiled while the weights come.
    with ThreadPoolExecutor(1) as pool:
        if config.load_format == "dummy":
            loading = pool.submit(random_weights, model, mesh, dtype, seed=config.seed)
        else:
            loading = pool.submit(files.load_weights, model, mesh, dtype, partial(on_progress, "weights"))
        loading.add_done_callback(lambda _: seconds.update({WEIGHTS: time.perf_counter() - start}))

        def on_compiled(done: int, total: int) -> None:
            on_progress("programs", done, total)
            processes.check()
            if loading.done():
                loading.result()  # weights that cannot be loaded end it at once

        runner.compile(on_compiled)
        seconds["programs"] = time.perf_counter() - start
        weights = loading.result()[1]
        placing = time.perf_counter()
        runner.place(weights)
        seconds["page pool"] = time.perf_counter() - placing
    processes.gather("ready")  # whoever fails before says why, and none begins a step that another never joins
    parts = resolved, model, tokenizer, chat, eos, defaults, buckets, layout, runner, attention, seconds
    return Loaded(*parts, adapters, processes)


def _check_alike(processes: Processes, *programs: Any) -> None:
    """`InputError` unless all processes make the same programs, of what has this `repr`."""
    if processes.count == 1:
        return
    first, *others = processes.gather((jax.__version__, sources_digest(), repr(programs)))
    for number, other in enumerate(others, 1):
        if other != first:
            raise InputError(
                f"process {number} would run other programs than process 0; give both the same model files, versions "
                "of jaxserve and JAX, and machines"
            )


def _attention(config: EngineConfig, model: ModelConfig, dtype: jnp.dtype, devices: np.ndarray) -> tuple[str, bool]:
    """What runs attention and why, in a line; `InputError` if `attention_backend` asks for what cannot run here.

    And whether running sequences' next tokens are computed in prefill steps as well. That takes a prefill kernel for
    which a tile of one token is little work: others compute whole tiles.
    """
    device = devices.flat[0]
    if config.attention_backend == MOSAIC_GPU and not is_hopper(device):
        raise InputError(
            f"attention_backend={MOSAIC_GPU!r} is for Hopper GPUs and this is {device.device_kind}; leave it out"
        )
    if config.attention_backend == NATIVE and device.platform != "cpu":
        raise InputError(f"attention_backend={NATIVE!r} is for CPUs and this is {device.device_kind}; leave it out")
    shape = AttentionShape(
        model.num_heads // devices.size,
        model.num_kv_heads // devices.size,
        model.key_dim,
        model.value_dim,
        config.page_size,
        dtype.name,
        tile_size=TILE_SIZE,
    )
    try:
        decode = choose_decode(config.attention_backend, shape, device)
        prefill = choose_prefill(config.attention_backend, shape, device)
    except ValueError as error:
        raise InputError(f"attention_backend={config.attention_backend!r} cannot serve this: {error}") from error
    line = f"attention runs in {decode.implementation}: {decode.reason}"
    if decode != prefill:
        line = f"decode {line}; prefill attention in {prefill.implementation}: {prefill.reason}"
    return line, prefill.implementation == NATIVE


def _resolve(
    config: EngineConfig,
    model: ModelConfig,
    weight_bytes: int,
    mesh: Mesh,
    processes: Processes,
    dtype: jnp.dtype,
    *,
    mixed: bool,
) -> tuple[ResolvedConfig, Buckets, CacheLayout]:
    """Every setting that was left open, from the model, the platform and the memory; and what follows from them."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    defaults = ON_CPU if on_cpu else ON_GPU

    def sizes(config: EngineConfig) -> Sizes:
        return sizes_of(
            config,
            model,
            dtype,
            defaults,
            min_decode_rows=1 if products_run_natively(dtype, mesh.devices.flat[0].platform) else MIN_DECODE_ROWS,
            smallest_tile=1 if on_cpu else TILE_SIZE,  # kernels take whole tiles only
            mixed=mixed,
        )

    asked = sizes(config)
    layout, max_model_len = asked.layout, asked.max_model_len
    num_pages = config.num_pages or plan_pages(
        page_bytes=asked.page_bytes,
        wanted=asked.wanted_pages,
        device=mesh.local_devices[0],
        devices=mesh.devices.size,
        utilization=config.gpu_memory_utilization,
        weight_bytes=weight_bytes,
        working_bytes=asked.working_bytes,
    )
    num_pages = min(processes.gather(num_pages))
    if layout.pages_of(max_model_len) > num_pages:
        held = layout.longest_within(num_pages, max_model_len)
        if not held or config.max_model_len is not None:
            raise InputError(
                f"the page pool holds {held} tokens of one request ({num_pages} pages of {config.page_size}) and "
                f"max_model_len is {max_model_len}, so that a single request may not fit; lower max_model_len or give "
                "more pages"
            )
        max_model_len = held
    chosen = {
        "dtype": dtype.name,
        "max_model_len": max_model_len,
        "max_num_seqs": asked.max_num_seqs,
        "max_num_batched_tokens": asked.max_num_batched_tokens,
        "max_decode_steps": config.max_decode_steps or defaults.max_decode_steps,
        "num_pages": num_pages,
    }
    resolved = ResolvedConfig(**(dataclasses.asdict(config) | chosen))
    return resolved, sizes(resolved).buckets, layout
