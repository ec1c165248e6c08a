import dataclasses

import pytest
from jax._src import xla_bridge

from jaxserve.errors import InputError
from jaxserve.runner.memory import plan_pages, reserve_gpu_memory

GIB = 2**30
NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@dataclasses.dataclass
class GPU:
    """A GPU of 100 GiB of which JAX has reserved `share`, and somebody's arrays occupy `others`."""

    share: float
    others: int = 0
    platform: str = "cuda"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": int(self.share * 100 * GIB), "bytes_in_use": self.others * GIB}


def pages(gpu: GPU, utilization: float, *, devices: int = 1, wanted: int = 10**6) -> int:
    """Pages of a GiB each that are planned beside 20 GiB of weights and 5 GiB of working memory on each device."""
    return plan_pages(
        page_bytes=GIB,
        wanted=wanted,
        device=gpu,  # type: ignore[arg-type]
        devices=devices,
        utilization=utilization,
        weight_bytes=20 * GIB * devices,
        working_bytes=5 * GIB * devices,
    )


def start_jax(monkeypatch: pytest.MonkeyPatch, *, started: bool) -> None:
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: started)


def test_the_share_is_reserved_before_jax_starts(monkeypatch):
    start_jax(monkeypatch, started=False)
    monkeypatch.setenv(NAMES[0], "")  # so that what is set here goes again after the test
    reserve_gpu_memory(0.9)
    assert pages(GPU(share=0.9), 0.9) == 90 - 20 - 5
    assert pages(GPU(share=0.9), 0.9, devices=4) == 4 * (90 - 20 - 5)
    assert pages(GPU(share=0.9), 0.9, wanted=7) == 7


@pytest.mark.parametrize("name", NAMES)
def test_a_users_own_reservation_stays_and_is_the_limit(monkeypatch, name):
    start_jax(monkeypatch, started=False)
    monkeypatch.setenv(name, "0.5")
    reserve_gpu_memory(0.9)
    with pytest.warns(UserWarning, match="asks for 90.0 GiB of each GPU and JAX has reserved 50.0"):
        assert pages(GPU(share=0.5), 0.9) == 50 - 20 - 5
    assert pages(GPU(share=0.5), 0.4) == 40 - 20 - 5


def test_a_jax_that_runs_already_keeps_what_it_has(monkeypatch):
    start_jax(monkeypatch, started=True)
    reserve_gpu_memory(0.9)
    with pytest.warns(UserWarning, match="before anything else uses JAX"):
        assert pages(GPU(share=0.75), 0.9) == 75 - 20 - 5
    assert pages(GPU(share=0.75), 0.6) == 60 - 20 - 5  # of the GPU, not of what JAX has reserved
    assert pages(GPU(share=0.75, others=30), 0.6) == 75 - 30 - 20 - 5  # beside the arrays of someone else


def test_too_little_memory_is_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match=r"no page of 1024\.0 MiB fits .* raise gpu_memory_utilization"):
        pages(GPU(share=0.75), 0.25)
