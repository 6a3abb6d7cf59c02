"""The verb `serve`: an OpenAI-shaped HTTP server in front of a model."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.answers import Drafter
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    Config,
    Device,
    Dtype,
    EngineSizes,
    KvCacheDtype,
    Lora,
    Model,
    NoCache,
    Pin,
    Quantized,
    Threads,
    as_verb,
    check_options,
    named,
    open_llm,
    parse_config,
)
from selfdraft.errors import OptionError
from selfdraft.methods import ALIASES, OPTIONS, drafter_of

if TYPE_CHECKING:
    from selfdraft.llm import LLM
    from selfdraft.serve.settings import Settings

Option = typer.Option
Host = Annotated[str, Option(help="The address to listen at; any other than loopback needs a key.")]
Port = Annotated[int, Option(help="The port to listen at; 0 takes a free one.", min=0, max=65535)]
ApiKeyFile = Annotated[
    Path | None, Option(help="A file with one API key a line; or set SELFDRAFT_API_KEY.", metavar="FILE")
]
ApiKey = Annotated[
    list[str] | None, Option(help="An API key; other users of this machine can read it. May be repeated.")
]
NoAuth = Annotated[bool, Option("--no-auth", help="Listen beyond loopback without a key.")]
ServedName = Annotated[str | None, Option(help="The name that clients use for the model.")]
MaxBatch = Annotated[int, Option(help="Answers that are generated at the same time.", min=1, max=1024)]
MaxQueue = Annotated[int, Option(help="Requests that wait for a slot; more are refused with 429.", min=0)]
MaxModelLen = Annotated[int | None, Option(help="Most tokens of prompt and answer together.", min=2)]
MaxOutput = Annotated[int, Option(help="Most tokens of one answer.", min=1)]
KvTokens = Annotated[int | None, Option(help="Most tokens that all running requests hold together.", min=1)]
Chunk = Annotated[int, Option(help="Tokens of a prompt that one step reads.", min=1)]
MaxBody = Annotated[int, Option(help="Most bytes of a request.", min=1024)]
QueueTimeout = Annotated[float, Option(help="Seconds that a request may wait for a slot.")]
RequestTimeout = Annotated[float, Option(help="Seconds that a request may take.")]
ShutdownTimeout = Annotated[float, Option(help="Seconds that requests have to end after SIGTERM.")]
Allowed = Annotated[
    str, Option(help="Drafters that a request may ask for, with commas; 'none' and the server's own always.")
]
Profiles = Annotated[
    list[str] | None,
    Option("--task-profile", help="NAME=FILE of 'tune task': requests may ask for it. May be repeated."),
]
SharedMemory = Annotated[
    bool, Option("--shared-memory", help="Draft from all callers' earlier answers; timing tells of them then.")
]
NoReuse = Annotated[bool, Option("--no-prefix-reuse", help="Prefill every prompt whole.")]
Pace = Annotated[
    float, Option(help="Seconds between the padded events of a stream, which hides what drafts tell; 0: as steps end.")
]
Details = Annotated[
    bool | None,
    Option("--details/--no-details", help="Clients may ask who drafted each token; on when bound to loopback."),
]
VllmMetrics = Annotated[bool, Option("--vllm-metrics", help="Export the counters under vLLM's names, too.")]
AllowedHost = Annotated[list[str] | None, Option(help="A further Host header to take. May be repeated.")]
Cors = Annotated[list[str] | None, Option(help="A web origin whose pages may call. May be repeated.")]
Page = Annotated[bool, Option("--page/--no-page", help="The page at /.")]
OnRay = Annotated[
    bool, Option("--ray", help="Serve from replicas on Ray Serve (the extra 'ray'); SIGHUP restarts them.")
]
Replicas = Annotated[int, Option(help="With --ray: processes that serve, each with its own model.", min=1, max=4096)]
MaxReplicas = Annotated[
    int | None, Option(help="With --ray: scale up to so many under load, and down to --replicas without.", min=1)
]
TargetRequests = Annotated[
    float | None, Option(help="With --max-replicas: requests per replica to scale for; --max-batch when not given.")
]
TargetTokens = Annotated[
    float | None,
    Option(help="With --max-replicas: tokens in flight per replica to scale for; 1024 for each of --max-batch."),
]
ScaleDelay = Annotated[
    float,
    Option(help="With --max-replicas: seconds of load before scaling up; 20 times as many without before down.", min=0),
]
ReplicaCpus = Annotated[
    float | None, Option(help="With --ray: processors that Ray keeps for a replica; --threads, or 1, when not given.")
]
ReplicaGpus = Annotated[float, Option(help="With --ray: GPUs that Ray keeps for a replica.", min=0.0)]


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of the verb, in the order of its help."""

    model: Model = DEFAULT_MODEL
    drafter: Drafter = None
    speculative_config: Config = None
    adapter: Adapters = None
    lora: Lora = None
    quantization: Quantized = "auto"
    host: Host = "127.0.0.1"
    port: Port = 8000
    api_key_file: ApiKeyFile = None
    api_key: ApiKey = None
    no_auth: NoAuth = False
    served_model_name: ServedName = None
    max_batch: MaxBatch = 16
    max_queue: MaxQueue = 64
    max_model_len: MaxModelLen = None
    max_output_tokens: MaxOutput = 4096
    kv_tokens: KvTokens = None
    prefill_chunk: Chunk = 256
    max_body: MaxBody = 2 * 2**20
    queue_timeout: QueueTimeout = 60.0
    request_timeout: RequestTimeout = 600.0
    shutdown_timeout: ShutdownTimeout = 30.0
    allow_drafters: Allowed = ""
    task_profile: Profiles = None
    shared_memory: SharedMemory = False
    no_prefix_reuse: NoReuse = False
    stream_pace: Pace = 0.0
    details: Details = None
    vllm_metrics: VllmMetrics = False
    allowed_host: AllowedHost = None
    cors_origin: Cors = None
    page: Page = True
    dtype: Dtype = "auto"
    device: Device = "auto"
    kv_cache_dtype: KvCacheDtype = "auto"
    threads: Threads = None
    pin_threads: Pin = False
    no_cache: NoCache = False
    ray: OnRay = False
    replicas: Replicas = 1
    max_replicas: MaxReplicas = None
    target_requests: TargetRequests = None
    target_tokens: TargetTokens = None
    scale_delay: ScaleDelay = 30.0
    replica_cpus: ReplicaCpus = None
    replica_gpus: ReplicaGpus = 0.0


RAY_OPTIONS = (
    *("replicas", "max_replicas", "target_requests", "target_tokens", "scale_delay"),
    *("replica_cpus", "replica_gpus"),
)
"""Options that mean nothing without --ray."""


def serve(given: ServeOptions) -> None:
    """Serve a model over HTTP as OpenAI's API, with a page at /."""
    check_options(given.model, given.drafter, given.speculative_config, given.dtype)
    try:
        from selfdraft.serve.app import Server
        from selfdraft.serve.run import bind, run
    except ImportError as error:
        raise OptionError(f"serve needs {error.name}: pip install 'selfdraft[serve]'") from error
    settings = settings_of(given)
    check_profiles(given, settings)
    if given.ray:
        from selfdraft.integrations.ray.required import check_ray

        check_ray()
        from selfdraft.integrations.ray.command import run_on_ray

        raise SystemExit(run_on_ray(given))
    check_no_ray_options(given)
    sock = bind(given.host, given.port)  # a port that is taken is said before anything heavy is loaded
    if not terminal.err.is_terminal:  # a log must not be silent while kernels are built for the first time
        terminal.note(f"loading {given.model} ...")
    llm = llm_of(given)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("uvicorn.error").name = "uvicorn"  # it says everything there, errors or not
    server = Server(llm, settings)
    address = f"http://{given.host}:{sock.getsockname()[1]}"
    page = f"; the page: {address}/" if given.page else ""
    terminal.note(f"{settings.model_name} at {address}/v1 with drafter {llm.drafter_name}{page}; Ctrl-C ends")
    raise SystemExit(run(server, sock))


def check_no_ray_options(given: ServeOptions) -> None:
    """Errors: OptionError for an option of --ray without it."""
    for field in fields(given):
        if field.name in RAY_OPTIONS and getattr(given, field.name) != field.default:
            raise OptionError(f"--{field.name.replace('_', '-')} is for replicas on Ray Serve: give --ray, too")


def llm_of(given: ServeOptions) -> LLM:
    """The model behind the options, with an engine for a server. Errors: LoadError, OptionError."""
    return open_llm(
        given.model,
        given.drafter,
        given.speculative_config,
        given.dtype,
        "bitwise",
        given.threads,
        given.adapter,
        no_cache=given.no_cache,
        lora=given.lora,
        quantization=given.quantization,
        kv_cache_dtype=given.kv_cache_dtype,
        device=given.device,
        remember=given.shared_memory,
        pin=given.pin_threads,
        # one piece of a prompt a step: whoever decodes waits for no more than that
        engine=EngineSizes(given.max_batch, False, given.max_model_len, given.prefill_chunk, given.prefill_chunk),
    )


def settings_of(given: ServeOptions) -> Settings:
    """The server's settings. Errors: OptionError."""
    from selfdraft.serve.settings import LOOPBACK, Settings, read_keys

    same = {field.name for field in fields(Settings)} & {field.name for field in fields(given)} - {"details"}
    return Settings(
        **{name: getattr(given, name) for name in same},
        model_name=given.served_model_name or Path(given.model).name or given.model,
        keys=read_keys(given.api_key, given.api_key_file),
        allowed_hosts=tuple(given.allowed_host or ()),
        cors_origins=tuple(given.cors_origin or ()),
        task_profiles=profiles_in(given.task_profile or ()),
        drafters=tuple(named(given.allow_drafters)) if given.allow_drafters else (),
        prefix_reuse=not given.no_prefix_reuse,
        details=given.host in LOOPBACK if given.details is None else given.details,
    )


def check_profiles(given: ServeOptions, settings: Settings) -> None:
    """Errors: OptionError for task profiles that no drafter of this server reads."""
    own, _ = drafter_of(given.drafter, parse_config(given.speculative_config))
    allowed = [ALIASES.get(name, name) for name in (own, *settings.drafters)]
    able = [name for name, options in OPTIONS.items() if "task_profile" in options]
    known = all(name in OPTIONS for name in allowed)  # a drafter of another package says itself what it reads
    if settings.task_profiles and known and not set(allowed) & set(able):
        raise OptionError(
            f"--task-profile is read by the drafters {', '.join(able)}, and this server has {', '.join(allowed)}: give "
            "one of them as --drafter, or in --allow-drafters"
        )


def profiles_in(given: Sequence[str]) -> dict[str, Path]:
    """Files by the names that requests use. Errors: OptionError, also for a file that is no task profile."""
    from selfdraft.files.task_profiles import check_task_name, read_task_profile

    found: dict[str, Path] = {}
    for one in given:
        name, sign, file = one.partition("=")
        if not sign or not file:
            raise OptionError(f"--task-profile {one} is not NAME=FILE")
        check_task_name(name, f"--task-profile {one}")
        if name in found:
            raise OptionError(f"two --task-profile are called {name!r}")
        found[name] = Path(file).expanduser()
        read_task_profile(found[name])
    return found


verb = as_verb(ServeOptions, serve)
