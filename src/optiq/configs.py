"""One frozen dataclass of options per stage.

They are the only source of flags, TOML keys and the options table in the docs: a field made by
`option` carries its help text, its flag is `--name-with-dashes`, its TOML key the field name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal

from optiq.artifacts import BITS, Method, QuantOption, Rounding
from optiq.errors import UsageError

Effort = Literal["quick", "standard", "thorough"]

KV_BITS = (8, 4)
"""Bits that keys and values can be held in."""

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def option(default: Any, help_text: str, **metadata: Any) -> Any:  # noqa: ANN401  a dataclass field, like dataclasses.field
    """A dataclass field with help text; `metadata` may hold `metavar`."""
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def words_of(*configs: Any) -> tuple[str, ...]:  # noqa: ANN401  dataclasses of this file
    """The words of a command line that ask for these options; of paths, the last part."""
    words: list[str] = []
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            flag = "--" + field.name.replace("_", "-")
            if value == field.default:
                continue
            if value is True:
                words.append(flag)
                continue
            for item in value if isinstance(value, tuple) else (value,):
                words += [flag, item.name if isinstance(item, Path) else str(item)]
    return tuple(words)


def parse_size(text: str) -> int:
    """Bytes of `8.3GB` (10^9), `7.7GiB` (2^30) or a plain number.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"'{text}' is no size; write 90MB, 8.3GB or 7.7GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _positive(value: float | None, name: str) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} must be a positive number, not {value}")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Options every long verb takes."""

    work: Path | None = option(
        None, "Work directory for intermediate state; default: in the user cache, by source."
    )
    memory_limit: str | None = option(
        None, "Refuse to start when more memory would be needed, e.g. 8GB."
    )
    offline: bool = option(False, "Use no network: hub sources must be in the cache.")
    revision: str | None = option(None, "Branch, tag or commit of a hub source.")
    tokenizer: Path | None = option(
        None, "Directory with the tokenizer, where the source has none or no merges."
    )
    dry_run: bool = option(False, "Print the preflight (time, memory, disk, device) and stop.")


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """How sensitivity is measured."""

    method: Method = option(
        "fisher", "fisher: streamed sketch; exact: one module at a time; static: no data."
    )
    reference: Literal["source", "uniform4"] = option(
        "source",
        "Model whose output counts as right; uniform4 is for comparison with published quants.",
    )
    effort: Effort = option("standard", "Tokens and probes: quick, standard or thorough.")
    rounding: Rounding = option(
        "gptq", "Rounding that options are scored with and convert uses: rtn, search, gptq."
    )
    calibration: Path | None = option(
        None, "JSON lines of text or messages, used in place of the built-in corpus."
    )
    extend_calibration: bool = option(
        False, "Add --calibration to the built-in corpus instead of replacing it."
    )
    seed: int = option(0, "Seed of the probes and of the choice of windows.")
    verify: bool = option(
        False, "Check the table by brute force on a random sample of module x option pairs."
    )

    def __post_init__(self) -> None:
        """Refuse what a method cannot honour."""
        if self.method != "fisher" and self.reference != "source":
            raise UsageError(
                f"--reference {self.reference} works with --method fisher, not '{self.method}'"
            )
        if self.method != "fisher" and self.verify:
            raise UsageError(f"--verify checks --method fisher; '{self.method}' has no need of it")
        if self.extend_calibration and self.calibration is None:
            raise UsageError("--extend-calibration needs --calibration FILE")


@dataclasses.dataclass(frozen=True)
class AllocateConfig:
    """The budget and what restricts the choice of bits. Default target: 5.0 bpw."""

    target_bpw: float | None = option(
        None, "Stored bits per weight, scales and biases included. Default 5.0."
    )
    target_size: str | None = option(None, "Bytes of model*.safetensors, e.g. 8.3GB.")
    target_kl: float | None = option(
        None, "Largest KL in nats per token, checked after converting."
    )
    pin: tuple[str, ...] = option(
        (), "GLOB=BITS/GROUP, GLOB=bf16 or GLOB=lattice; may be repeated.", metavar="GLOB=OPTION"
    )
    min_bits: int = option(2, "Fewest bits of a code for any module.")
    free_routers: bool = option(False, "Lift the floor of 8 bits for routers and gates.")
    objective: Literal["size", "speed"] = option(
        "size", "speed also weighs bytes read per token and kernel speed."
    )

    def __post_init__(self) -> None:
        """Refuse two targets and values out of range."""
        given = [
            n for n in ("target_bpw", "target_size", "target_kl") if getattr(self, n) is not None
        ]
        if len(given) > 1:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UsageError(f"give one target, not {len(given)}: {flags}")
        _positive(self.target_bpw, "--target-bpw")
        _positive(self.target_kl, "--target-kl")
        if self.target_size is not None and parse_size(self.target_size) <= 0:
            raise UsageError(f"--target-size must be positive, not '{self.target_size}'")
        if self.min_bits not in BITS:
            raise UsageError(f"--min-bits must be one of {list(BITS)}, not {self.min_bits}")
        for pin in self.pin:
            pattern, equals, choice = pin.partition("=")
            if not (pattern and equals):
                raise UsageError(f"--pin '{pin}' is not GLOB=OPTION, e.g. '*.down_proj=6/64'")
            QuantOption.parse(choice)


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Where the model goes and which artifacts to start from."""

    sensitivity: Path | None = option(None, "Use this sensitivity.json instead of measuring.")
    plan: Path | None = option(None, "Use this plan.json instead of allocating.")
    rival: bool = option(
        False, "Judge the uniform quantization that is not smaller beside it, for the card."
    )
    drafter_target: Path | None = option(
        None, "Of a drafter: the model it drafts for, to measure how often it is right."
    )
    force: bool = option(False, "Replace an output directory that optiq wrote before.")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """How fidelity is judged."""

    text: Path | None = option(
        None, "JSON lines of held-out text or messages; default: the built-in held-out corpus."
    )
    window: int = option(256, "Tokens of a window.")
    max_windows: int | None = option(
        None, "Judge at most this many windows, drawn evenly over the domains."
    )
    deep: bool = option(
        False, "Report KL by position and language too, and the worst tokens with their text."
    )

    def __post_init__(self) -> None:
        """Refuse windows too short to score."""
        if self.window < 16:
            raise UsageError(f"--window must be at least 16 tokens, not {self.window}")
        if self.max_windows is not None and self.max_windows < 2:
            raise UsageError(f"--max-windows must be at least 2, not {self.max_windows}")


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What `optiq bench` times."""

    prompt_tokens: int = option(512, "Tokens of the prompt.")
    new_tokens: int = option(64, "Tokens to generate.")
    repeats: int = option(3, "Runs; the median is reported.")

    def __post_init__(self) -> None:
        """Refuse empty runs."""
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            _positive(getattr(self, name), "--" + name.replace("_", "-"))


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What `optiq generate` writes, and how."""

    image: tuple[Path, ...] = option(
        (), "Picture that the prompt is about; may be repeated.", metavar="FILE"
    )
    image_detail: str = option(
        "auto", "low, auto, high, or the most soft tokens of a picture.", metavar="DETAIL"
    )
    raw: bool = option(
        False, "Continue the prompt as it is, without chat template; special tokens are read."
    )
    thinking: bool = option(False, "Let the model think before it answers, where it can.")
    max_tokens: int | None = option(None, "Most tokens to write; default: the rest of the context.")
    temperature: float | None = option(
        None, "0 always takes the most likely token; default: as the checkpoint says, else 1."
    )
    top_p: float | None = option(None, "Draw from the most likely tokens of this probability.")
    top_k: int | None = option(None, "Draw from as many of the most likely tokens; 0 for all.")
    min_p: float | None = option(
        None, "Draw from tokens at least as likely as this share of the most likely."
    )
    repetition_penalty: float | None = option(
        None, "Above 1, tokens of prompt and answer become less likely."
    )
    presence_penalty: float | None = option(
        None, "Taken from the logits of tokens that are in the answer."
    )
    frequency_penalty: float | None = option(
        None, "Taken from the logits of tokens for every time that they are in the answer."
    )
    stop: tuple[str, ...] = option((), "Text that ends the answer; may be repeated.")
    seed: int | None = option(None, "Seed of the draws; default: a fresh one.")
    drafter: str | None = option(
        None,
        "Speculative decoding: an assistant or a smaller model with the same tokenizer, or ngram.",
        metavar="DIR|ngram",
    )
    num_drafts: str = option(
        "auto", "Drafts of a round; auto lets measurements decide.", metavar="N|auto"
    )

    def __post_init__(self) -> None:
        """Refuse words that are no numbers."""
        _positive(self.max_tokens, "--max-tokens")
        if self.num_drafts != "auto" and not self.num_drafts.isdecimal():
            raise UsageError(f"--num-drafts is '{self.num_drafts}'; give a number, or auto")
        detail = self.image_detail
        if detail not in {"low", "auto", "high"} and not detail.isdecimal():
            raise UsageError(f"--image-detail is '{detail}'; give low, auto, high or a number")
        if self.raw and self.thinking:
            raise UsageError("--thinking needs the chat template; leave --raw out")
        if self.num_drafts != "auto" and self.drafter is None:
            raise UsageError("--num-drafts needs --drafter")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What `optiq eval` asks, and how."""

    tasks: tuple[str, ...] = option(
        (), "Benchmark; may be repeated. Default: all six.", metavar="NAME"
    )
    task_file: Path | None = option(
        None, "JSON lines of exact-match items of your own, scored as one more task."
    )
    data_dir: Path | None = option(
        None, "Directory with the benchmark files; default: the hub, at pinned revisions."
    )
    full: bool = option(False, "All items of MMLU, GSM8K and BFCL instead of the default share.")
    limit: int | None = option(None, "At most this many items a benchmark, evenly drawn.")
    mmlu_form: Literal["text", "chat"] = option("text", "MMLU as raw text or as a chat message.")
    gsm8k_form: Literal["auto", "chat", "text"] = option(
        "auto", "GSM8K zero-shot in chat, or 8-shot as raw text; auto: chat if there is a template."
    )
    bfcl_form: Literal["native", "prompt"] = option(
        "native", "Offer functions in the model's own tool format, or described in the prompt."
    )
    humaneval_form: Literal["auto", "chat", "text"] = option(
        "auto", "HumanEval in chat or as text to continue; auto: chat if there is a template."
    )
    hashhop_published: bool = option(
        False, "The 100 HashHop chains of published cards instead of 1,000."
    )
    hashhop_max_chars: int | None = option(
        None, "Leave out longer HashHop prompts; default: those beyond the model's context."
    )
    sampling: Literal["greedy", "model"] = option(
        "greedy", "greedy, or model: the checkpoint's own sampling."
    )
    seeds: int = option(1, "Runs with different seeds, with --sampling model.")
    samples: int = option(1, "HumanEval samples a problem, for pass@k, with --sampling model.")
    thinking: bool = option(False, "Let the model think before it answers, where it can.")
    max_tokens: int | None = option(None, "Longest answer; default: by benchmark.")
    batch_size: int = option(8, "Sequences generated at a time.")
    seed: int = option(0, "Seed of item choice and of sampling.")
    allow_code_execution: bool = option(
        False, "Run code that the model writes, in a sandbox; HumanEval needs it."
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be honoured."""
        for name in ("limit", "seeds", "samples", "max_tokens", "batch_size", "hashhop_max_chars"):
            _positive(getattr(self, name), "--" + name.replace("_", "-"))
        for name in ("seeds", "samples"):
            if getattr(self, name) > 1 and self.sampling == "greedy":
                raise UsageError(
                    f"--{name} {getattr(self, name)} needs --sampling model: greedy answers repeat"
                )


@dataclasses.dataclass(frozen=True)
class ServedConfig:
    """A model behind an OpenAI-compatible URL, in place of a directory."""

    served: str | None = option(
        None, "OpenAI-compatible URL of the model, e.g. http://localhost:8080/v1.", metavar="URL"
    )
    served_model: str | None = option(
        None, "Name of the model at the URL; default: the only one there.", metavar="NAME"
    )
    concurrency: int = option(8, "Requests in flight at a time.")
    timeout: float = option(600.0, "Seconds to wait for an answer before it is asked for again.")

    def __post_init__(self) -> None:
        """Refuse options of a URL without one."""
        _positive(self.concurrency, "--concurrency")
        _positive(self.timeout, "--timeout")
        if self.served is None and self.served_model is not None:
            raise UsageError("--served-model names a model at --served URL; give the URL")
        if self.served is not None and not re.match(r"https?://[^/\s]+", self.served):
            raise UsageError(f"--served '{self.served}' is no http:// or https:// URL")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What `optiq serve` serves, to whom, and within which limits."""

    model: tuple[Path, ...] = option(
        (), "Model directory, or a directory of them; may be repeated.", metavar="DIR"
    )
    alias: tuple[str, ...] = option(
        (),
        "Another name of a model; * takes every unknown name. May be repeated.",
        metavar="NAME=MODEL",
    )
    drafter: str | None = option(
        None,
        "Speculative decoding: an assistant or a smaller model with the same tokenizer, or ngram.",
        metavar="DIR|ngram",
    )
    num_drafts: str = option(
        "auto", "Drafts of a round; auto lets measurements decide.", metavar="N|auto"
    )
    host: str = option("127.0.0.1", "Address to listen at; another than loopback needs an API key.")
    port: int = option(8080, "Port to listen at; 0 takes a free one and prints it.")
    api_key_file: Path | None = option(
        None, "File of API keys, one a line; default: OPTIQ_API_KEY.", metavar="FILE"
    )
    allowed_host: tuple[str, ...] = option(
        (), "Name that requests may call the server by; may be repeated.", metavar="NAME"
    )
    cors_origin: tuple[str, ...] = option(
        (), "Origin of web pages that may ask; may be repeated.", metavar="URL"
    )
    image_host: tuple[str, ...] = option(
        (),
        "Host that images of requests may be fetched from; may be repeated. Default: none.",
        metavar="NAME[:PORT]",
    )
    max_body: str = option("32MiB", "Largest body of a request.", metavar="SIZE")
    max_context: int | None = option(
        None, "Tokens of prompt and answer at most; default: the model's own."
    )
    max_running: int = option(32, "Answers written at a time by one model.")
    max_queue: int = option(256, "Requests that wait at most; more are refused with 429.")
    request_timeout: float = option(600.0, "Seconds after which a request is ended.")
    drain: float = option(30.0, "Seconds that running answers get when the server is stopped.")
    memory_limit: str | None = option(
        None, "Memory of all loaded models at most, e.g. 8GB; default: four fifths of all."
    )
    cache_limit: str | None = option(
        None, "Memory of kept prompts at most, e.g. 2GB; default: by what is free.", metavar="SIZE"
    )
    kv_bits: int | None = option(
        None,
        "Bits of keys and values in layers of full attention; default: the model's own type.",
        metavar="8|4",
    )
    idle_unload: float | None = option(
        None, "Seconds without a request after which a model leaves the memory; default: never."
    )
    log_json: bool = option(False, "Write the log as one JSON object a line.")

    def __post_init__(self) -> None:
        """Refuse what cannot be honoured."""
        positive = ("max_context", "max_running", "max_queue", "request_timeout", "idle_unload")
        for name in positive:
            _positive(getattr(self, name), "--" + name.replace("_", "-"))
        if not (math.isfinite(self.drain) and self.drain >= 0):
            raise UsageError(f"--drain must be a number of seconds, not {self.drain}")
        if self.kv_bits not in (None, *KV_BITS):
            raise UsageError(f"--kv-bits is {self.kv_bits}; give 8 or 4")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"--port must be 0 to 65535, not {self.port}")
        if self.num_drafts != "auto" and not self.num_drafts.isdecimal():
            raise UsageError(f"--num-drafts is '{self.num_drafts}'; give a number, or auto")
        if self.num_drafts != "auto" and self.drafter is None:
            raise UsageError("--num-drafts needs --drafter")
        for name in ("max_body", "memory_limit", "cache_limit"):
            size = getattr(self, name)
            if size is not None and parse_size(size) <= 0:
                raise UsageError(f"--{name.replace('_', '-')} must be positive, not '{size}'")
        self._check_names()

    def _check_names(self) -> None:
        for origin in self.cors_origin:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s*]+/?", origin, re.IGNORECASE):
                raise UsageError(f"--cors-origin '{origin}' is no origin: scheme://name[:port]")
        for host in self.allowed_host:
            if not re.fullmatch(r"\*|[\w.:-]+", host):
                raise UsageError(f"--allowed-host '{host}' is no name; leave scheme and port out")
