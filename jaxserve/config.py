"""Settings from keywords, command-line flags or a YAML file, checked once; and all those of the engine."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import yaml

from jaxserve.chat.styles import REASONING_PARSERS, TOOL_CALL_PARSERS
from jaxserve.errors import InputError, nearest

DEMO_MODEL = Path(__file__).parent / "demo_model"
_KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "an integer"),
    float: (int | float, "a number"),
    str: (str | os.PathLike, "a text"),
}
LOAD_FORMATS = ("auto", "dummy")
DTYPES = ("auto", "bfloat16", "float16", "float32")
QUANTIZATIONS = ("int8", "fp8", "int4")  # `layers.quantisation.KINDS`, which brings JAX, as does the next
ATTENTION_BACKENDS = ("auto", "mosaic_gpu", "native", "xla")  # `pallas_kernels.implementations`


def setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A record of settings, each with its help; flags are made from its fields. Values of another type are refused."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind, *others = get_args(field.type) or (field.type,)
            accepted, wanted = _KINDS[kind]
            if get_origin(field.type) is tuple:
                self._check_several(field.name, accepted, wanted)
            elif isinstance(value, accepted) and (kind is bool or not isinstance(value, bool)):
                if kind is str:
                    object.__setattr__(self, field.name, os.fspath(value))
            elif value is not None or type(None) not in others:
                raise InputError(f"{field.name} is {value!r}; give {wanted}")

    def _check_several(self, name: str, accepted: Any, wanted: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, list | tuple) or not all(isinstance(item, accepted) for item in value):
            raise InputError(f"{name} is {value!r}; give a list, and in it each time {wanted}")
        object.__setattr__(self, name, tuple(value))

    def _one_of(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise InputError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(allowed)}")

    def _at_least(self, lowest: int, *names: str) -> None:
        """None is at least anything."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not lowest <= value < float("inf"):
                kind = "an integer" if isinstance(value, int) else "a number"
                raise InputError(f"{name} is {value!r}; give {kind} from {lowest} on")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """From keywords or a file's entries; an unknown name is an error that names the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise InputError(f"there is no setting {name!r}{nearest(name, known)}")
        return cls(**settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """What an engine is made of. None lets the engine choose from the model and the device."""

    model: str | None = setting(
        None, "model directory, or an id of HuggingFace's hub; the demo model that ships inside if left out"
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub id; a commit pins it")
    hf_config_path: str | None = setting(
        None,
        "directory of config.json and tokenizer, if not the model's: a training script's Orbax checkpoint has none",
    )
    tokenizer: str | None = setting(None, "directory of the tokenizer, if not the model's")
    skip_tokenizer_init: bool = setting(False, "load no tokenizer: token ids in, token ids out")
    chat_template: str | None = setting(None, "file of a chat template to use in place of the checkpoint's own")
    reasoning_parser: str = setting(
        "auto",
        f"style of its reasoning: {', '.join(REASONING_PARSERS)}; auto tells it from chat template and tokenizer",
    )
    tool_call_parser: str = setting(
        "auto", f"style of its tool calls: {', '.join(TOOL_CALL_PARSERS)}; none leaves them in the text"
    )
    load_format: str = setting(
        "auto", "auto reads the checkpoint; dummy makes random weights from config.json alone, to measure speed"
    )
    dtype: str = setting("auto", f"of weights and KV cache: {', '.join(DTYPES)}; auto takes the checkpoint's")
    quantization: str | None = setting(
        None,
        f"keep the weights of linear layers in fewer bits: {', '.join(QUANTIZATIONS)}; int4 has a scale and a zero for "
        "every 128 of a row, the others a scale for every output; as the checkpoint has them if left out",
    )
    lora_modules: tuple[str, ...] = setting(
        (), "LoRA adapter that requests may name, as name=directory or name=hub id, in the format that PEFT saves"
    )
    max_loras: int | None = setting(
        None,
        "places for adapters: more than there are lora_modules let others come and go while the engine runs, with "
        "memory for all layers; as many as lora_modules if left out",
    )
    max_lora_rank: int | None = setting(
        None, "largest rank that there is memory for in each place; the largest of lora_modules if left out, or 16"
    )
    max_model_len: int | None = setting(
        None, "most tokens of prompt and completion together; the model's own limit if left out"
    )
    max_num_seqs: int | None = setting(
        None, "sequences that run at the same time; 32 on a CPU and 256 on a GPU by default"
    )
    max_num_batched_tokens: int | None = setting(
        None,
        "prompt tokens that one step computes, long prompts taking several; 512 on a CPU and 4096 on a GPU by default",
    )
    max_itl_ms: float | None = setting(
        None,
        "milliseconds between two tokens of a running sequence that prompts of others should not exceed: prefill steps "
        "are cut to what fits; no bound if left out",
    )
    max_decode_steps: int | None = setting(
        None,
        "most tokens that one decode step brings each sequence, while no request waits; 8 on a CPU and 1 on a GPU, "
        "where the next step is dispatched before the last one has ended, by default",
    )
    decode_burst_ms: float = setting(
        5.0, "milliseconds that such a step of several tokens may take, which is what a newcomer may have to wait"
    )
    enable_prefix_caching: bool = setting(
        True, "keep the pages of finished prompts and completions, for those that begin with the same tokens"
    )
    tensor_parallel_size: int = setting(1, "devices that share every layer")
    coordinator_address: str | None = setting(
        None,
        "host:port of the first of several processes that share the model, mostly one a host, which the others can "
        "reach; run the same command for each",
    )
    num_processes: int = setting(1, "how many these are")
    process_id: int = setting(0, "the number of this one, from 0 on; the first answers, and its settings count")
    attention_backend: str = setting(
        "auto",
        f"what attention runs in: {', '.join(ATTENTION_BACKENDS)}; auto takes mosaic_gpu on Hopper GPUs"
        " and native on CPUs with AVX2",
    )
    page_size: int = setting(64, "token positions in one page of the KV cache")
    num_pages: int | None = setting(None, "pages in the KV cache; chosen from the memory at hand if left out")
    gpu_memory_utilization: float = setting(
        0.9,
        "share of each GPU's memory that the engine may take, reserved at the start unless XLA_CLIENT_MEM_FRACTION is "
        "set",
    )
    max_logprobs: int = setting(20, "most log-probabilities that a request may ask for at each position")
    seed: int = setting(0, "of the requests that bring no seed of their own")
    compilation_cache_dir: str = setting(
        "~/.cache/jaxserve", "where compiled programs are kept for the next start; '' keeps none"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("dtype", DTYPES)
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise InputError(
                f"quantization is {self.quantization!r}; give one of {', '.join(QUANTIZATIONS)}, or leave it out for a "
                "checkpoint that is quantised already"
            )
        self._one_of("load_format", LOAD_FORMATS)
        self._one_of("attention_backend", ATTENTION_BACKENDS)
        self._one_of("reasoning_parser", REASONING_PARSERS)
        self._one_of("tool_call_parser", TOOL_CALL_PARSERS)
        self._at_least(1, "tensor_parallel_size", "page_size")
        self._at_least(1, "max_loras", "max_lora_rank")
        self._at_least(1, "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_decode_steps", "num_pages")
        self._at_least(0, "max_logprobs")
        self._check_processes()
        if not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization!r}; give a share above 0 and at most 1"
            )
        if self.max_itl_ms is not None and not 0 < self.max_itl_ms < float("inf"):
            raise InputError(f"max_itl_ms is {self.max_itl_ms!r}; give milliseconds above 0")
        if not 0 <= self.decode_burst_ms < float("inf"):
            raise InputError(f"decode_burst_ms is {self.decode_burst_ms!r}; give milliseconds from 0 on")

        self._check_adapters()

    def _check_processes(self) -> None:
        host, _, port = (self.coordinator_address or "").rpartition(":")
        if self.coordinator_address is not None and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(
                f"coordinator_address is {self.coordinator_address!r}; give host:port of the first process, such as "
                "10.0.0.1:8476"
            )
        self._at_least(1, "num_processes")
        self._at_least(0, "process_id")
        if self.process_id >= self.num_processes:
            raise InputError(
                f"process_id is {self.process_id} of num_processes={self.num_processes}; they are numbered from 0 on"
            )
        if self.num_processes > 1 and self.coordinator_address is None:
            raise InputError(
                f"num_processes is {self.num_processes} and there is no coordinator_address; give the first "
                "one's host:port"
            )

    @property
    def adapters(self) -> dict[str, str]:
        """Where each adapter is, by its name."""
        return dict(entry.split("=", 1) for entry in self.lora_modules)

    def _check_adapters(self) -> None:
        names = []
        for entry in self.lora_modules:
            name, separator, path = entry.partition("=")
            if not (name and separator and path):
                raise InputError(f"lora_modules has {entry!r}; give each adapter as name=directory")
            if name in names:
                raise InputError(f"lora_modules has two adapters {name!r}; give each a name of its own")
            names.append(name)
        if self.max_loras is not None and self.max_loras < len(names):
            raise InputError(
                f"max_loras is {self.max_loras} and lora_modules gives {len(names)}; give it as many places at least"
            )
        if self.num_processes > 1 and self.max_loras is not None and self.max_loras > len(names):
            raise InputError(
                f"max_loras is {self.max_loras} and lora_modules gives {len(names)}, and with num_processes="
                f"{self.num_processes} adapters come at the start only; leave max_loras out"
            )

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        if isinstance(by_name := settings.get("lora_modules"), dict):
            settings = settings | {"lora_modules": [f"{name}={path}" for name, path in by_name.items()]}
        if "trust_remote_code" in settings:
            raise InputError(
                "trust_remote_code is no setting, since code that comes with a checkpoint is never run; leave it "
                "out, and convert a checkpoint that needs it to a supported architecture"
            )
        return super().from_settings(settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """The settings of a running engine: everything that was left to it is chosen."""

    model: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_decode_steps: int
    num_pages: int


def read_preset(path: str) -> dict[str, Any]:
    """The settings of a YAML file, with flags' dashes and fields' underscores taken as the same."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read the preset {path} ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no settings; write one 'name: value' a line")
    return {str(name).replace("-", "_"): value for name, value in loaded.items()}
