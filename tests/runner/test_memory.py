import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import xla_bridge

from jaxserve import LLM
from jaxserve.errors import InputError
from jaxserve.runner import memory
from jaxserve.runner.memory import check_state, plan_pages, reserve_gpu_memory
from jaxserve.runner.programs import DeviceState
from jaxserve.runner.runner import Runner

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
    process_index: int = 0

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


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes this one a machine of so many GiB, of which some are free, and of a container that may have `limit`."""

    def make(total: int, free: int, *, swap: int = 0, limit: str = "max") -> None:
        kib = {"MemTotal": total, "MemAvailable": free, "SwapTotal": swap, "SwapFree": swap}
        (tmp_path / "meminfo").write_text("".join(f"{name}: {size * 2**20} kB\n" for name, size in kib.items()))
        (tmp_path / "limit").write_text(f"{limit}\n")
        monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "_CONTAINER_LIMITS", (tmp_path / "none", tmp_path / "limit"))
        sizes = {"SC_PHYS_PAGES": total * GIB // 4096, "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr("os.sysconf", sizes.get)

    return make


def check(state: int, weights: int, device: GPU | jax.Device | None = None) -> None:
    """Check so many GiB of either."""
    shapes = [jax.ShapeDtypeStruct((size * GIB,), jnp.int8) for size in (state, weights)]
    devices = np.array([device or jax.devices()[0]])
    check_state(shapes[0], shapes[1], devices, num_pages=7, max_num_seqs=3)


def test_what_is_more_than_all_memory_is_refused(machine):
    machine(24, 20, swap=8)
    check(state=12, weights=8)
    with pytest.raises(
        InputError,
        match=r"num_pages=7 and max_num_seqs=3 take 25\.0 GiB beside 8\.0 GiB of weights, and "
        r"there are 32\.0 GiB of memory; lower",
    ):
        check(state=25, weights=8)
    with pytest.raises(InputError, match=r"take 80\.0 GiB beside 20\.0 GiB of weights, and there are 90\.0 GiB"):
        check(state=80, weights=20, device=GPU(share=0.9))
    check(state=70, weights=20, device=GPU(share=0.9))


def test_what_is_more_than_a_container_may_have_is_refused_and_not_planned(machine):
    machine(64, 60, limit=str(8 * GIB))
    with pytest.raises(InputError, match=r"there are 8\.0 GiB of memory"):
        check(state=5, weights=4)
    cpu = jax.devices()[0]
    planned = plan_pages(
        page_bytes=GIB, wanted=9, device=cpu, devices=1, utilization=0.9, weight_bytes=GIB, working_bytes=GIB
    )
    assert planned == 2


def test_what_is_more_than_what_is_free_is_a_warning_since_others_may_leave(machine):
    machine(24, 10, swap=2)
    check(state=4, weights=8)
    with pytest.warns(UserWarning, match=r"take 13\.0 GiB and some 12\.0 GiB of memory are free; lower num_pages"):
        check(state=5, weights=8)
    memory._MEMINFO.unlink()  # as where there is no Linux
    check(state=5, weights=8)


def test_memory_that_turns_out_to_be_missing_is_told_in_a_sentence(monkeypatch):
    def exhausted():
        raise ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 2457600000 bytes.")

    monkeypatch.setattr(Runner, "compile", lambda runner, _: runner._compiled.update({DeviceState: exhausted}))
    with pytest.raises(InputError, match=r"num_pages=40 and max_num_seqs=2 take .* and so much is not free; lower"):
        LLM(num_pages=40, max_num_seqs=2, progress=False)
