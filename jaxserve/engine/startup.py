"""From settings to a runner that is ready: model, mesh, weights, pages, programs."""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxserve.chat.format import ChatFormat
from jaxserve.checkpoint.huggingface import abstract_model, read_config
from jaxserve.checkpoint.model_files import find_model
from jaxserve.checkpoint.random_weights import random_weights
from jaxserve.checkpoint.tokenizer import eos_token_ids, load_tokenizer, read_generation_config, sampling_defaults
from jaxserve.config import DEMO_MODEL, EngineConfig, ResolvedConfig
from jaxserve.engine.input_processor import chat_format
from jaxserve.errors import InputError
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import model_config
from jaxserve.parallel.mesh import make_mesh, placed_shapes
from jaxserve.runner.buckets import MIN_DECODE_ROWS, TILE_SIZE, Buckets
from jaxserve.runner.cache_layout import CacheLayout
from jaxserve.runner.kv_cache import page_bytes
from jaxserve.runner.memory import array_bytes, plan_pages, reserve_gpu_memory, working_bytes
from jaxserve.runner.runner import Runner
from pallas_kernels.attention_shape import AttentionShape
from pallas_kernels.implementations import MOSAIC_GPU, NATIVE, is_hopper
from pallas_kernels.matmul import products_run_natively
from pallas_kernels.paged_attention import choose_decode, choose_prefill

WEIGHTS = "weights, at the same time"  # the stage that programs are compiled beside


class Sizes(NamedTuple):
    """Settings that depend on the device and were left open."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_decode_steps: int


CPU_SIZES = Sizes(32, 512, 8)
GPU_SIZES = Sizes(256, 4096, 1)  # a loop of unknown length makes a GPU wait for the host in each round

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


def load(config: EngineConfig, on_progress: OnProgress) -> Loaded:
    """Load and compile everything; `InputError` for a checkpoint or a setting that cannot be served."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def stage_done(name: str) -> None:
        nonlocal start
        seconds[name], start = time.perf_counter() - start, time.perf_counter()

    reserve_gpu_memory(config.gpu_memory_utilization)
    files = find_model(
        config.model or str(DEMO_MODEL),
        revision=config.revision,
        hf_config_path=config.hf_config_path,
        with_weights=config.load_format != "dummy",
    )
    hf = read_config(files.config)
    generation = read_generation_config(files.config)
    eos, defaults = eos_token_ids(generation, hf), sampling_defaults(generation)
    model = quantised(model_config(hf), config.quantization)
    model = model.served_up_to(config.max_model_len or model.max_position_embeddings)
    tokenizer_path = None if config.skip_tokenizer_init else config.tokenizer or str(files.config)
    tokenizer = load_tokenizer(Path(tokenizer_path)) if tokenizer_path is not None else None
    if tokenizer is not None and len(tokenizer) > model.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.vocab_size}; they do not belong together"
        )
    chat = chat_format(tokenizer, config)
    stage_done("configuration and tokenizer")

    mesh = make_mesh(config.tensor_parallel_size)
    placed = model.over_tensor_axis(config.tensor_parallel_size)
    dtype = serving_dtype(config.dtype, hf)
    attention, mixed = _attention(config, placed, dtype, mesh.devices)
    graph, shapes = abstract_model(placed, dtype)
    shapes = placed_shapes(mesh, shapes)
    named = dataclasses.replace(config, model=files.name, tokenizer=tokenizer_path)
    resolved, buckets, layout = _resolve(named, placed, shapes, mesh.devices, dtype, mixed=mixed)
    runner = Runner(
        graph,
        shapes,
        placed,
        mesh,
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
            if loading.done():
                loading.result()  # weights that cannot be loaded end it at once

        runner.compile(on_compiled)
        seconds["programs"] = time.perf_counter() - start
        weights = loading.result()[1]
        placing = time.perf_counter()
        runner.place(weights)
        seconds["page pool"] = time.perf_counter() - placing
    return Loaded(resolved, model, tokenizer, chat, eos, defaults, buckets, layout, runner, attention, seconds)


def quantised(model: ModelConfig, quantization: str | None) -> ModelConfig:
    """The model with the setting `quantization`, which may repeat what its checkpoint has."""
    if quantization is None or quantization == model.quantization:
        return model
    if model.quantization is not None:
        raise InputError(
            f"quantization={quantization!r} and the checkpoint's weights are {model.quantization} already; leave it out"
        )
    return dataclasses.replace(model, quantization=quantization)


def serving_dtype(name: str, hf: dict[str, Any]) -> jnp.dtype:
    """The setting `dtype`, or what `auto` is for the checkpoint's config."""
    if name == "auto":
        stored = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        name = stored if stored in ("bfloat16", "float16", "float32") else "bfloat16"
    return jnp.dtype(name)


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
    config: EngineConfig, model: ModelConfig, shapes: Any, devices: np.ndarray, dtype: jnp.dtype, *, mixed: bool
) -> tuple[ResolvedConfig, Buckets, CacheLayout]:
    """Every setting that was left open, from the model, the platform and the memory; and what follows from them."""
    on_cpu = devices.flat[0].platform == "cpu"
    sizes = CPU_SIZES if on_cpu else GPU_SIZES
    max_num_seqs = config.max_num_seqs or sizes.max_num_seqs
    max_num_batched_tokens = config.max_num_batched_tokens or sizes.max_num_batched_tokens
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise InputError(
            f"max_model_len={max_model_len} is more than the {model.max_position_embeddings} positions "
            "that this model was made for; lower it"
        )

    def buckets() -> Buckets:
        return Buckets.of(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=min(max_num_batched_tokens, max_model_len * max_num_seqs),
            max_model_len=max_model_len,
            page_size=config.page_size,
            min_decode_rows=1 if products_run_natively(dtype, devices) else MIN_DECODE_ROWS,
            smallest_tile=1 if on_cpu else TILE_SIZE,  # kernels take whole tiles only
            mixed=mixed,
        )

    layout = CacheLayout.of(
        [kind.window for kind in model.layer_kinds],
        page_size=config.page_size,
        max_step_tokens=buckets().prefill[-1].tokens,
        max_model_len=max_model_len,
    )
    num_pages = config.num_pages or plan_pages(
        page_bytes=page_bytes(model, layout, dtype),
        wanted=max_num_seqs * layout.pages_of(max_model_len),
        device=devices.flat[0],
        devices=devices.size,
        utilization=config.gpu_memory_utilization,
        weight_bytes=array_bytes(shapes),
        working_bytes=working_bytes(model, buckets(), dtype.itemsize),
    )
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
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_decode_steps": config.max_decode_steps or sizes.max_decode_steps,
        "num_pages": num_pages,
    }
    return ResolvedConfig(**(dataclasses.asdict(config) | chosen)), buckets(), layout
