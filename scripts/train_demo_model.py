"""Train jaxserve's demo model from nothing, on text that this script makes itself.

The model is what `LLM()` loads when it is given no directory: a Qwen3 of 1.4 million parameters that chats a little,
adds and subtracts, knows a few facts, calls tools, writes JSON and remembers a code word. Training needs no download
and no accelerator. Stopped at any time, it continues from its last checkpoint when it is started again.

    .venv/bin/python scripts/train_demo_model.py --out /tmp/demo_model
    .venv/bin/python scripts/evaluate_demo_model.py --model /tmp/demo_model
"""

import argparse
import collections
import dataclasses
import itertools
import json
import queue
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package of this checkout, installed or not

import demo_tasks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxserve.checkpoint.huggingface import save_weights
from jaxserve.layers.attention import Attend
from jaxserve.layers.rotary import RopeConfig
from jaxserve.models.config import LayerKind, ModelConfig
from jaxserve.models.qwen3 import Qwen3ForCausalLM

ROPE = RopeConfig(theta=1_000_000.0)
CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=1280,
    hidden_size=192,
    intermediate_size=384,
    layer_kinds=(LayerKind(rope=ROPE),) * 4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    qk_norm=True,
)

# --- tokenizer -------------------------------------------------------------------------------------------------------

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISIBLE = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# Digits stand alone. Lower-case words take the space before them, as prose is made of them; other words do not, so that
# a name or a code word has the same tokens after a space, a quotation mark or a line break, and copying is copying.
PIECES = r"\p{N}| ?\p{Ll}+|\p{Lu}+(?!\p{Ll})|\p{Lu}\p{Ll}*| ?[^\s\p{L}\p{N}]+(?: [^\s\p{L}\p{N}]+)*|\n+"

CHAT_TEMPLATE = r"""
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- set has_system = messages and messages[0].role == 'system' %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if has_system %}{{- messages[0].content + '\n\n' }}{% endif %}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif has_system %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.content is not string and message.content is iterable %}
        {%- set content = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}
    {%- endif %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning.strip('\n')) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {{- '\n' if content or not loop.first }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
""".strip()


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=CONFIG.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def render(tokenizer: PreTrainedTokenizerFast, item: demo_tasks.Item) -> str:
    """The prompt exactly as a server sends it to the model."""
    return tokenizer.apply_chat_template(
        item.messages, tools=item.tools, enable_thinking=item.thinking, add_generation_prompt=True, tokenize=False
    )


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text has tokens, and the tasks' text has few."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng, renderer = random.Random(seed), wrap(tokenizer)
    items = [demo_tasks.draw(rng, held_out=False) for _ in range(8000)]
    markers = re.compile("|".join(map(re.escape, SPECIAL + VISIBLE)))
    texts = (text for item in items for text in markers.split(render(renderer, item) + item.completion()))
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size - len(SPECIAL + VISIBLE),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in VISIBLE])
    return wrap(tokenizer)


def kept_tokenizer(directory: Path, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer whose tokens the checkpoints in `directory` embed; made now if there are no checkpoints yet."""
    file = directory / "tokenizer.json"
    if file.exists():
        return wrap(Tokenizer.from_file(str(file)))
    tokenizer = train_tokenizer(seed)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(file))
    return tokenizer


# --- batches ---------------------------------------------------------------------------------------------------------

SHORT_ROWS, SHORT_LENGTH = 4, 416
COPY_STEPS = 1500  # before them no long rows: finding a word far back waits for copying at all
HARDEST = (demo_tasks.repeat, demo_tasks.tools)  # they need copying, which half of the tasks wait for
HARDEST_SHARE = 0.25  # of the items, besides the tasks' own shares
LONG_EVERY, LONG_LENGTHS = 2, (1024, 2048)
WAITING = 6
WORDS_PER_TOKEN = 0.85  # of filler, so that a long row's prompt fills it


@dataclasses.dataclass
class Rows:
    """Whole conversations in rows of equal length; `segments` tells a row's conversations apart (0: padding)."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray  # 1 where the token is one that the model has to write
    spans: list[tuple[str, int, slice]] = dataclasses.field(default_factory=list)  # task, row, what the model writes

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("tokens", "positions", "segments", "targets")}


def pack(tokenizer: PreTrainedTokenizerFast, items: Iterator[demo_tasks.Item], rows: int, length: int) -> Rows:
    """Fill rows with items: each with the oldest that still fits of a few that wait. Longer ones are passed over."""
    packed = Rows(*(np.zeros((rows, length), np.int32) for _ in range(4)))
    waiting: list[tuple[str, list[int], list[int]]] = []
    row, start, segment = 0, 0, 1
    while row < rows:
        while len(waiting) < WAITING:
            item = next(items)
            prompt = tokenizer(render(tokenizer, item)).input_ids
            written = tokenizer(item.completion() + "<|im_end|>").input_ids
            if len(prompt) + len(written) <= length:
                waiting.append((item.task, prompt, written))
        fitting = [index for index, (_, *both) in enumerate(waiting) if start + sum(map(len, both)) <= length]
        if not fitting:
            row, start, segment = row + 1, 0, 1
            continue
        task, prompt, written = waiting.pop(fitting[0])
        middle, end = start + len(prompt), start + len(prompt) + len(written)
        packed.tokens[row, start:end] = prompt + written
        packed.positions[row, start:end] = np.arange(end - start)
        packed.segments[row, start:end] = segment
        packed.targets[row, middle:end] = 1
        packed.spans.append((task, row, slice(middle, end)))
        start, segment = end, segment + 1
    return packed


def step_batch(tokenizer: PreTrainedTokenizerFast, seed: int, step: int, *, held_out: bool) -> list[Rows]:
    """Step `step`'s batch, which depends on nothing else: rows of short items, at times a long one."""
    rng = random.Random(f"{seed} {step} {held_out}")

    def items() -> Iterator[demo_tasks.Item]:
        while True:
            maker = rng.choice(HARDEST) if rng.random() < HARDEST_SHARE else None
            yield demo_tasks.draw(rng, held_out=held_out, maker=maker)

    mixed = items()
    batch = [pack(tokenizer, mixed, SHORT_ROWS, SHORT_LENGTH)]
    if step % LONG_EVERY == 0 and (step >= COPY_STEPS or held_out):
        length = LONG_LENGTHS[step // LONG_EVERY % len(LONG_LENGTHS)]
        words = int(rng.uniform(0.3, 0.95) * length * WORDS_PER_TOKEN)
        far = demo_tasks.draw(rng, held_out=held_out, maker=lambda rng: demo_tasks.recall(rng, words))
        far.task = "code word, far"
        batch.append(pack(tokenizer, itertools.chain([far], mixed), 1, length))
    return batch


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, first: int) -> Iterator[list[Rows]]:
    """Training's batches from step `first` on, made ahead by a thread."""
    made: queue.Queue[list[Rows]] = queue.Queue(maxsize=8)

    def make() -> None:
        for step in itertools.count(first):
            made.put(step_batch(tokenizer, seed, step, held_out=False))

    threading.Thread(target=make, daemon=True).start()
    while True:
        yield made.get()


# --- model and optimizer ---------------------------------------------------------------------------------------------

QUERY_BLOCK = 256


def causal_attend(segments: jax.Array) -> Attend:
    """Dense causal attention within segments, query block by query block: what a block cannot see costs nothing."""

    def multiply(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
        contract = (((axes[0],), (axes[1],)), ((0, 1), (0, 1)))
        return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, **variants: Any) -> jax.Array:
        if any(value is not None for value in variants.values()):
            raise ValueError(f"training's attention has no variants, but the model asks for {variants}")
        rows, length, heads, dim = q.shape
        kv_heads = k.shape[2]
        # Heads first, and a KV head's queries side by side: products whose results XLA need not transpose.
        q = (q * scale).reshape(rows, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        blocks = []
        for start in range(0, length, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, length)
            causal = np.arange(start, end)[:, None] >= np.arange(end)
            visible = causal & (segments[:, start:end, None] == segments[:, None, :end])
            hide = jnp.tile(jnp.where(visible, 0.0, -1e9)[:, None], (1, 1, heads // kv_heads, 1))
            block = q[:, :, :, start:end]
            scores = multiply(block.reshape(rows, kv_heads, -1, dim), k[:, :, :end], (3, 3)) + hide
            weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
            blocks.append(multiply(weights, v[:, :, :end], (3, 2)).astype(v.dtype).reshape(block.shape))
        return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, dim)

    return attend


def token_losses(model: Qwen3ForCausalLM, rows: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """For every token but the first: its loss, and whether it is the model's first choice."""
    hidden = model(rows["tokens"], rows["positions"], causal_attend(rows["segments"]))
    logits, wanted = model.logits(hidden[:, :-1]), rows["tokens"][:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, wanted), logits.argmax(-1) == wanted


def optimizer(muon_rate: float = 0.02, adam_rate: float = 0.005) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for the layers' matrices, Adam for the embedding and the norms.

    The rates are the highest ones; training scales the updates by its schedule.
    """

    def dimensions(params: Any) -> Any:
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)  # weights are [out, in]
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: matrix if leaf.ndim == 2 and "embedding" not in jax.tree_util.keystr(path) else None,
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            muon_rate, adam_learning_rate=adam_rate, adam_b2=0.98, muon_weight_dimension_numbers=dimensions
        ),
    )


def schedule(progress: float) -> float:
    """The learning rate's share at a share of the training steps: a short rise, a plateau, a straight fall."""
    return max(0.0, min(progress / 0.02, 1.0, (1.0 - progress) / 0.65))


class Trainer:
    """The parameters, the optimizer's state, and the clock, all of which a checkpoint holds."""

    def __init__(self, seed: int):
        self.graph, params = nnx.split(Qwen3ForCausalLM(CONFIG, rngs=nnx.Rngs(seed)), nnx.Param)
        transform = optimizer()
        self.state: dict[str, Any] = {"params": params, "optimizer": transform.init(params), "step": 0, "seconds": 0.0}

        def loss(params: nnx.State, batch: list[dict[str, jax.Array]]) -> jax.Array:
            # The arithmetic is bfloat16's, as it is when the exported model is served.
            model = nnx.merge(self.graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
            total = count = jnp.zeros(())
            for rows in batch:
                targets = rows["targets"][:, 1:]
                total += (token_losses(model, rows)[0] * targets).sum()
                count += targets.sum()
            return total / count

        @jax.jit
        def update(params: nnx.State, optimizer_state: Any, batch: list, scale: jax.Array) -> tuple:
            value, gradients = jax.value_and_grad(loss)(params, batch)
            updates, optimizer_state = transform.update(gradients, optimizer_state, params)
            return optax.apply_updates(params, jax.tree.map(lambda leaf: leaf * scale, updates)), optimizer_state, value

        self._update = update
        self._correct = jax.jit(lambda params, rows: token_losses(nnx.merge(self.graph, params), rows)[1])

    def train_step(self, batch: list[Rows], progress: float) -> jax.Array:
        state = self.state
        arrays = [rows.arrays() for rows in batch]
        state["params"], state["optimizer"], loss = self._update(
            state["params"], state["optimizer"], arrays, np.float32(schedule(progress))
        )
        state["step"] += 1
        return loss

    def rounded(self) -> nnx.State:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), self.state["params"])

    def exact(self, batches: list[list[Rows]]) -> dict[str, float]:
        """The share of each task's items that greedy decoding would get right to the last token.

        No decoding is needed: it writes the wanted text if and only if every wanted token is the first choice after
        the ones before it.
        """
        outcomes = collections.defaultdict(list)
        for rows in itertools.chain.from_iterable(batches):
            correct = np.asarray(self._correct(self.rounded(), rows.arrays()))
            for task, row, span in rows.spans:
                outcomes[task].append(bool(correct[row, span.start - 1 : span.stop - 1].all()))
        return {task: float(np.mean(outcomes[task])) for task in sorted(outcomes)}


# --- export ----------------------------------------------------------------------------------------------------------


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a HuggingFace model directory."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    save_weights(nnx.merge(trainer.graph, trainer.state["params"]), out)
    end, pad = (tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>"))
    config = {
        "architectures": [CONFIG.architecture],
        "model_type": "qwen3",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "head_dim": CONFIG.head_dim,
        "max_position_embeddings": CONFIG.max_position_embeddings,
        "rope_theta": ROPE.theta,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": CONFIG.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "eos_token_id": end,
        "pad_token_id": pad,
    }
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_model"), help="model directory to write (%(default)s)")
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        default=Path("demo_checkpoints"),
        help="where to keep checkpoints and continue from; remove it to start anew (%(default)s)",
    )
    parser.add_argument("--steps", type=int, default=6_500, help="training steps, over all restarts (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the text (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokenizer, trainer = kept_tokenizer(arguments.checkpoint_dir, arguments.seed), Trainer(arguments.seed)
    held_out = [
        step_batch(tokenizer, arguments.seed, step, held_out=True) for step in range(0, 8 * LONG_EVERY, LONG_EVERY)
    ]
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(arguments.checkpoint_dir.absolute(), options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            trainer.state = manager.restore(latest, args=ocp.args.StandardRestore(trainer.state))
            print(f"continuing from step {latest} in {arguments.checkpoint_dir}")
        state = trainer.state
        tokens, reported, saved, began = 0, state["seconds"], state["seconds"], time.monotonic() - state["seconds"]
        print(f"{'minute':>6}  {'step':>6}  {'tokens/s':>8}  {'loss':>7}  right to the last token, of held-out items")
        first = int(state["step"])
        for batch in itertools.islice(batches(tokenizer, arguments.seed, first), max(0, arguments.steps - first)):
            loss = float(trainer.train_step(batch, state["step"] / arguments.steps))
            state["seconds"] = time.monotonic() - began
            tokens += sum(rows.tokens.size for rows in batch)
            if state["seconds"] - reported > 120:
                rate = tokens / (state["seconds"] - reported)
                shares = "  ".join(f"{task} {share:.0%}" for task, share in trainer.exact(held_out).items())
                print(
                    f"{state['seconds'] / 60:6.1f}  {state['step']:6d}  {rate:8.0f}  {loss:7.4f}  {shares}", flush=True
                )
                tokens, reported = 0, time.monotonic() - began
            if state["seconds"] - saved > 120:
                manager.save(int(state["step"]), args=ocp.args.StandardSave(state))
                saved = state["seconds"]
        manager.save(int(state["step"]), args=ocp.args.StandardSave(state), force=True)
    export(trainer, tokenizer, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir()) / 1e6
    print(
        f"wrote {arguments.out}: {size:.1f} MB after {state['step']} steps and {state['seconds'] / 60:.0f} minutes; "
        "evaluate_demo_model.py measures it"
    )


if __name__ == "__main__":
    main()
