"""The LM evaluation harness, with tasks of its own that are written here: nothing is downloaded.

Its log-likelihoods have to be those of `/score`, which are those of the Python API.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import checks
from checks import MODEL, Server, equal, holds

TOLERANCE = 1e-3
CHOICES = [
    {"question": "The capital of France is", "choices": ["Paris.", "Rome.", "an old lamp."], "answer": 0},
    {"question": "The capital of Italy is", "choices": ["Oslo.", "Rome.", "Ça, c'est naïve 🙂"], "answer": 1},
    {"question": "The colour of the sky is", "choices": ["green, as grass is", "blue"], "answer": 1},
]
QUESTIONS = [
    {"question": checks.QUESTION, "answer": checks.ANSWER},
    {"question": "What is 27+45?", "answer": "27 + 45 = 72"},
]
LIKELIHOOD = """\
task: likelihood
dataset_path: json
dataset_kwargs: {data_files: {test: CHOICES}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
CHAT = """\
task: chat
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["Question:"], max_gen_toks: 300, temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def evaluate(server: Server, task: str, *words: str, model: str, path: str, **arguments: object) -> list[Any]:
    """The samples of a run of `lm_eval` on the command line."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, items, text in (("CHOICES", CHOICES, LIKELIHOOD), ("QUESTIONS", QUESTIONS, CHAT)):
            file = place / f"{name.lower()}.jsonl"
            file.write_text("".join(json.dumps(item) + "\n" for item in items))
            (place / f"{name.lower()}.yaml").write_text(text.replace(name, str(file)))
        given = {"model": MODEL, "base_url": server.address + path} | arguments
        command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--tasks", task, "--include_path", folder]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
        command += ["--log_samples", "--output_path", folder, *words]
        offline = {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
        checks.command(command, settings=offline, folder=place)
        (samples,) = place.rglob(f"samples_{task}_*.jsonl")
        return [json.loads(line) for line in samples.read_text().splitlines()]


def compare(server: Server, *words: str, **arguments: object) -> None:
    samples = evaluate(server, "likelihood", *words, model="local-completions", path="/v1/completions", **arguments)
    equal("samples", len(samples), len(CHOICES))
    for sample in samples:
        document = sample["doc"]
        continuations = [f" {choice}" for choice in document["choices"]]
        scores = server.ask("/score", {"text_1": document["question"], "text_2": continuations})["data"]
        for score, choice, response in zip(scores, document["choices"], sample["filtered_resps"], strict=True):
            likelihood, greedy = float(response[0]), str(response[1]) == "True"
            apart = abs(likelihood - score["score"])
            holds(f"{choice!r} has {likelihood} as {score['score']}", apart < TOLERANCE)
            equal(f"whether {choice!r} is greedy", greedy, score["is_greedy"])
        holds("the right choice is found", sample["acc"] == 1.0)


def loglikelihoods_equal_our_scores(server: Server) -> None:
    compare(server, tokenizer_backend="huggingface", tokenizer=server.model_directory)


def loglikelihoods_with_the_servers_tokenizer(server: Server) -> None:
    compare(server, tokenizer_backend="remote")


def loglikelihoods_in_batches_side_by_side(server: Server) -> None:
    compare(server, "--batch_size", "3", tokenizer_backend="auto", num_concurrent=2)


def generated_answers(server: Server) -> None:
    samples = evaluate(
        server,
        "chat",
        "--apply_chat_template",
        model="local-chat-completions",
        path="/v1/chat/completions",
        num_concurrent=2,
    )
    equal("answers", [sample["filtered_resps"] for sample in samples], [[item["answer"]] for item in QUESTIONS])


if __name__ == "__main__":
    checks.run(
        loglikelihoods_equal_our_scores,
        loglikelihoods_with_the_servers_tokenizer,
        loglikelihoods_in_batches_side_by_side,
        generated_answers,
    )
