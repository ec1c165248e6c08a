"""The server as a deployment of Ray Serve, where Ray is installed: `pip install "jaxserve[ray]"`."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.server.processes import ENGINE, ROOT, wait_until

pytest.importorskip("ray", reason="Ray is an extra, too large for the environment of all tests")
ADDRESS = "http://127.0.0.1:8000"  # Ray Serve's own


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The deployment of `configs/`, with one replica."""
    deployment = yaml.safe_load((ROOT / "configs" / "deployment" / "ray-serve.yaml").read_text())
    (application,) = deployment["applications"]
    application["args"] = ENGINE
    application["deployments"][0] |= {"num_replicas": 1, "health_check_period_s": 1}
    file = tmp_path_factory.mktemp("ray") / "deployment.yaml"
    file.write_text(yaml.safe_dump(deployment))
    program = Path(sys.executable).parent
    process = subprocess.Popen([program / "serve", "run", file], env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        wait_until(answers, seconds=120)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def answers() -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{ADDRESS}/ready").status_code == 200
    return False


def test_it_answers_and_streams(deployed: None) -> None:
    asked = {"prompt": "Hello", "max_tokens": 20, "temperature": 0}
    whole = httpx.post(f"{ADDRESS}/v1/completions", json=asked).json()
    assert whole["usage"]["completion_tokens"] == 20
    with httpx.stream("POST", f"{ADDRESS}/v1/completions", json=asked | {"stream": True}) as response:
        events = [line for line in response.iter_lines() if line]
    assert len(events) > 2
    assert events[-1] == "data: [DONE]"
    refused = httpx.post(f"{ADDRESS}/v1/completions", json={"prompt": "Hello", "max_tokens": -1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


def test_a_replica_whose_engine_has_ended_is_replaced(deployed: None) -> None:
    def engines() -> list[int]:
        found = subprocess.run(["pgrep", "-f", "jaxserve.server.core"], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found if Path(f"/proc/{pid}").exists()]

    (before,) = engines()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: engines() and before not in engines(), seconds=60)
    wait_until(answers, seconds=60)
