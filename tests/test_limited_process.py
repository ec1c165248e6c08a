"""A process for hostile work: what it answers, what ends it, and what comes after."""

import gc
import os
import signal
import threading
from pathlib import Path

import pytest

from jaxserve.limited_process import LimitedProcess

PROGRAM = """
import json, os, resource, signal, sys
seconds, max_bytes = float(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
for line in sys.stdin:
    asked = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    if asked["do"] == "spin":
        while True:
            pass
    if asked["do"] == "take memory":
        bytearray(2**40)
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps({"pid": os.getpid(), "told": asked["do"]}), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return program


@pytest.fixture
def limited(program: Path) -> LimitedProcess:
    return LimitedProcess(program, str(2**30), seconds=0.2)


def test_it_answers_one_question_after_another_in_one_process(limited: LimitedProcess):
    first, second = limited.ask({"do": "é\n"}), limited.ask({"do": "x" * 10**6})
    assert (first["told"], second["told"]) == ("é\n", "x" * 10**6)
    assert first["pid"] == second["pid"] != os.getpid()


def test_a_question_that_takes_too_long_ends_the_process_and_the_next_has_another(limited: LimitedProcess):
    pid = limited.ask({"do": "something"})["pid"]
    assert limited.ask({"do": "spin"}) == {"error": "it takes more than 0.2 seconds"}
    assert limited.ask({"do": "something"})["pid"] != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_question_that_takes_too_much_memory_is_told_from_that(limited: LimitedProcess):
    assert limited.ask({"do": "take memory"}) == {"error": "it needs too much memory"}
    assert limited.ask({"do": "something"})["told"] == "something"


def test_a_process_that_somebody_has_ended_between_questions_is_replaced(limited: LimitedProcess):
    pid = limited.ask({"do": "something"})["pid"]
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert limited.ask({"do": "something"})["told"] == "something"


def test_threads_get_the_answers_to_their_own_questions(limited: LimitedProcess):
    told: dict[str, str] = {}

    def ask(name: str) -> None:
        for _ in range(20):
            told[name] = limited.ask({"do": name})["told"]
            assert told[name] == name

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {name: name for name in "abcd"}


def test_the_process_ends_with_its_owner(program: Path):
    limited = LimitedProcess(program, str(2**30), seconds=0.2)
    pid = limited.ask({"do": "something"})["pid"]
    del limited
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
