"""`jaxserve bench experts`: what a mixture of experts costs, by how many of its experts a step uses."""

import argparse
import time
from typing import Any

from jaxserve.cli.bench.workload import positive
from jaxserve.cli.flags import Parser
from jaxserve.cli.options import ENGINE, add_engine_flags, engine_config
from jaxserve.errors import InputError

_FLAGS = ENGINE.only("model", "revision", "dtype", "tensor_parallel_size")


def parser() -> Parser:
    parser = Parser(
        "bench experts",
        "Run the routed experts of one layer, with random weights of the sizes that a model's config.json gives, on\n"
        "tokens that are sent to more and more different experts. Print the time of each, and the rate at which\n"
        "the weights of the experts in use are read. Of the model nothing but config.json is needed.",
        examples=(
            "jaxserve bench experts --model ~/models/Qwen3-30B-A3B",
            "jaxserve bench experts --model ~/models/Mixtral-8x7B --tokens 512 --tensor-parallel-size 8",
        ),
    )
    parser.add_argument("--tokens", type=positive, default=32, metavar="N", help="in the step (default: 32)")
    parser.add_argument(
        "--num-iters", type=positive, default=10, metavar="N", help="times that each runs (default: 10)"
    )
    parser.add_argument("--output-json", metavar="FILE", help="write all numbers to this file")
    add_engine_flags(parser, _FLAGS)
    return parser


def run(arguments: argparse.Namespace) -> None:
    import jax  # on demand, as everything that it comes with
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxserve.cli.bench.session import write_report
    from jaxserve.engine.served_model import served_model
    from jaxserve.models.moe import MoEConfig, make_moe
    from jaxserve.parallel.mesh import make_mesh, parameter_shardings

    settings = engine_config(arguments, _FLAGS)
    files, _, config, dtype = served_model(settings, with_weights=False)
    if not isinstance(config, MoEConfig):
        raise InputError(f"{files.name} is a {config.architecture} without experts; give --model of one that has them")
    mesh = make_mesh(settings.tensor_parallel_size)
    config.over_tensor_axis(settings.tensor_parallel_size)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make_moe(config, dtype=dtype, rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(shapes)
    places = jax.tree.leaves(parameter_shardings(mesh, shapes))
    filled = (jnp.full(p.shape, 1e-3, p.dtype, device=where) for p, where in zip(leaves, places, strict=True))
    state = jax.tree.unflatten(tree, filled)
    router, tokens = config.router, arguments.tokens
    expert_bytes = sum(state[part]["weight"].nbytes for part in ("gate_up", "down")) // router.num_experts
    x = jnp.ones((tokens, config.hidden_size), dtype)
    weights = jnp.full((tokens, router.experts_per_token), 1 / router.experts_per_token)
    rows: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        route = jax.jit(lambda state, *inputs: nnx.merge(graph, state).route(*inputs))
        for active in _counts(router.experts_per_token, min(router.num_experts, tokens * router.experts_per_token)):
            assigned = np.arange(tokens * router.experts_per_token, dtype=np.int32) % active
            spread = np.linspace(0, router.num_experts - 1, active).astype(np.int32)
            experts = jnp.asarray(spread[assigned].reshape(weights.shape))
            seconds = []
            for _ in range(1 + arguments.num_iters):  # the first compiles
                start = time.perf_counter()
                route(state, x, experts, weights).block_until_ready()
                seconds.append(time.perf_counter() - start)
            best = min(seconds[1:])
            rate = active * expert_bytes / best
            rows.append({"active_experts": active, "seconds": seconds[1:], "bytes_per_second": rate})
    report = {
        "benchmark": "experts",
        "model": files.name,
        "dtype": dtype.name,
        "devices": mesh.devices.size,
        "tokens": tokens,
        "num_experts": router.num_experts,
        "experts_per_token": router.experts_per_token,
        "expert_bytes": expert_bytes,
        "steps": rows,
    }
    _print(report)
    write_report(report, arguments.output_json)


def _counts(least: int, most: int) -> list[int]:
    """`least`, doubled until `most` is reached, which ends the list."""
    counts = [least]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    return counts


def _print(report: dict[str, Any]) -> None:
    devices = f"{report['devices']} device{'s' * (report['devices'] > 1)}"
    print(
        f"{report['tokens']} tokens through {report['experts_per_token']} of {report['num_experts']} experts of "
        f"{report['expert_bytes'] / 1e6:.1f} MB each, {report['dtype']} on {devices}; best of "
        f"{len(report['steps'][0]['seconds'])} runs"
    )
    print(f"  {'experts in use':>14}  {'ms':>8}  {'GB/s of their weights':>21}")
    for step in report["steps"]:
        best = 1e3 * min(step["seconds"])
        print(f"  {step['active_experts']:>14}  {best:>8.2f}  {step['bytes_per_second'] / 1e9:>21.1f}")
