"""Measure the demo model: greedy answers to items that its training never saw, through the engine itself.

An item counts as right if the answer (what follows the thinking) is the wanted one, to the last character.

    .venv/bin/python scripts/evaluate_demo_model.py
    .venv/bin/python scripts/evaluate_demo_model.py --quantization int8
    .venv/bin/python scripts/evaluate_demo_model.py --model /tmp/demo_model --items 50 --show-wrong
"""

import argparse
import collections
import itertools
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package of this checkout, installed or not

import demo_tasks

from jaxserve import LLM, SamplingParams

FAR_WORDS = (200, 1400)  # of filler around a code word: up to the whole context
ANSWER_TOKENS = 160  # no right answer is longer
DEMANDED = 0.95

# What a newcomer types first; shown, and held to no answer.
FIRST_QUESTIONS = ("Hello!", "Who are you?", "What can you do?", "What is 27+45?", "What is the capital of France?")


TASKS = {
    "chat": demo_tasks.chat,
    "arithmetic": demo_tasks.arithmetic,
    "facts": demo_tasks.facts,
    "tool call": demo_tasks.tools,
    "tool answer": demo_tasks.tools,
    "json": demo_tasks.to_json,
    "repeat": demo_tasks.repeat,
    "code word": demo_tasks.recall,
    "code word, far": lambda rng: demo_tasks.recall(rng, rng.randint(*FAR_WORDS)),
}


def items_of(llm: LLM, task: str, thinking: bool, count: int, seed: int) -> list[tuple[demo_tasks.Item, list[int]]]:
    """`count` held-out items with their prompts' tokens, the same for the same seed; only such as fit the context."""
    rng = random.Random(f"evaluation {seed} {task} {thinking}")
    drawn = (demo_tasks.draw(rng, held_out=True, maker=TASKS[task]) for _ in itertools.count())
    wanted = (item for item in drawn if item.thinking == thinking and task.startswith(item.task))
    rendered = (
        (item, llm.render_chat(item.messages, tools=item.tools, enable_thinking=thinking)["prompt_token_ids"])
        for item in wanted
    )
    longest = llm.engine.config.max_model_len - ANSWER_TOKENS
    return list(itertools.islice((pair for pair in rendered if len(pair[1]) <= longest), count))


def answer_of(text: str) -> str:
    return text.rpartition("</think>\n\n")[2]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model directory; without it, the demo model that comes with jaxserve")
    parser.add_argument(
        "--quantization", help="in which its weights are kept: int8, fp8 or int4; as they are without it"
    )
    parser.add_argument("--items", type=int, default=200, help="per task, with thinking and without (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the items (%(default)s)")
    parser.add_argument("--show-wrong", action="store_true", help="print what was wanted and what came")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    llm = LLM(arguments.model, quantization=arguments.quantization, progress=False)
    greedy = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
    outcomes: dict[tuple[str, bool], list[bool]] = collections.defaultdict(list)
    longest = 0
    for task, thinking in itertools.product(TASKS, (True, False)):
        items, prompts = zip(*items_of(llm, task, thinking, arguments.items, arguments.seed), strict=True)
        longest = max(longest, *map(len, prompts))
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
        for item, output in zip(items, outputs, strict=True):
            text = output.outputs[0].text
            right = answer_of(text) == item.answer
            outcomes[task, thinking].append(right)
            if arguments.show_wrong and not right:
                print(f"{task}: {item.messages[-1]['content'][-200:]!r}")
                print(f"  wanted {item.answer!r}\n  got    {text!r}")
    print(f"{'task':16}{'thinking':>10}{'items':>8}{'right':>8}{'share':>9}")
    for (task, thinking), right in outcomes.items():
        share = sum(right) / len(right)
        print(f"{task:16}{'on' if thinking else 'off':>10}{len(right):8}{sum(right):8}{share:9.1%}")
    print(f"\nThe longest prompt has {longest} tokens. First questions:")
    for question in FIRST_QUESTIONS:
        [output] = llm.chat([{"role": "user", "content": question}], greedy)
        print(f"  {question:32}{answer_of(output.outputs[0].text)}")
    return 0 if all(sum(right) >= DEMANDED * len(right) for right in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
