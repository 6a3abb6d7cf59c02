"""The verb `serve`: an OpenAI-shaped HTTP server in front of a model."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from selfdraft.cli import terminal
from selfdraft.cli.answers import Drafter
from selfdraft.cli.options import (
    DEFAULT_MODEL,
    Adapters,
    Config,
    Dtype,
    Lora,
    Model,
    NoCache,
    Threads,
    check_options,
    named,
    open_llm,
)
from selfdraft.errors import OptionError

SERVED = "What a request may ask for, by name; 'none' and the server's own drafter always may."


def serve(
    model: Model = DEFAULT_MODEL,
    drafter: Drafter = None,
    speculative_config: Config = None,
    adapter: Adapters = None,
    lora: Lora = None,
    host: Annotated[str, typer.Option(help="The address to listen at; other than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that clients must send. May be repeated. Others on this machine can see it."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with one key a line.")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen beyond loopback without a key.")] = False,
    served_model_name: Annotated[str | None, typer.Option(help="The name that clients use for the model.")] = None,
    max_batch: Annotated[int, typer.Option(help="Answers that are generated at the same time.", min=1, max=1024)] = 16,
    max_queue: Annotated[int, typer.Option(help="Requests that wait for a slot; more get 429.", min=0)] = 64,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and answer.", min=2)] = None,
    max_output_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.", min=1)] = 4096,
    kv_tokens: Annotated[int | None, typer.Option(help="Most tokens that all running requests hold together.")] = None,
    prefill_chunk: Annotated[int, typer.Option(help="Tokens of a prompt that one step reads.", min=1)] = 256,
    max_body: Annotated[int, typer.Option(help="Most bytes of a request.", min=1024)] = 2 * 2**20,
    queue_timeout: Annotated[float, typer.Option(help="Seconds that a request may wait for a slot.")] = 60.0,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    shutdown_timeout: Annotated[float, typer.Option(help="Seconds that requests have to end after SIGTERM.")] = 30.0,
    allow_drafters: Annotated[str, typer.Option(help=SERVED)] = "",
    shared_memory: Annotated[
        bool, typer.Option("--shared-memory", help="Draft from all callers' earlier answers; its timing tells of them.")
    ] = False,
    no_prefix_reuse: Annotated[bool, typer.Option("--no-prefix-reuse", help="Prefill every prompt whole.")] = False,
    stream_pace: Annotated[
        float, typer.Option(help="Seconds between padded events of a stream; 0: as steps end. Hides what drafts say.")
    ] = 0.0,
    details: Annotated[
        bool | None,
        typer.Option(
            "--details/--no-details", help="Clients may ask who drafted each token; on when bound to loopback."
        ),
    ] = None,
    vllm_metrics: Annotated[bool, typer.Option("--vllm-metrics", help="Also export vLLM's metric names.")] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further Host header to take. May be repeated.")
    ] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="A web origin that may call. May be repeated.")] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The page at /.")] = True,
    dtype: Dtype = "auto",
    threads: Threads = None,
    no_cache: NoCache = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API, with a page at /."""
    check_options(model, drafter, speculative_config, dtype)
    try:
        from selfdraft.serve.run import bind, run
    except ImportError as error:
        raise OptionError(f"serve needs {error.name}: pip install 'selfdraft[serve]'") from error
    from selfdraft.serve.app import Server
    from selfdraft.serve.settings import LOOPBACK, Settings, read_keys

    name = served_model_name or Path(model).name or model
    settings = Settings(
        model_name=name,
        host=host,
        port=port,
        keys=read_keys(api_key, api_key_file),
        no_auth=no_auth,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        max_queue=max_queue,
        max_output_tokens=max_output_tokens,
        max_body=max_body,
        queue_timeout=queue_timeout,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
        kv_tokens=kv_tokens,
        drafters=tuple(named(allow_drafters)) if allow_drafters else (),
        shared_memory=shared_memory,
        prefix_reuse=not no_prefix_reuse,
        stream_pace=stream_pace,
        details=host in LOOPBACK if details is None else details,
        vllm_metrics=vllm_metrics,
        page=page,
    )
    sock = bind(host, port)
    llm = open_llm(
        model,
        drafter,
        speculative_config,
        dtype,
        "bitwise",
        threads,
        adapter,
        slots=max_batch,
        no_cache=no_cache,
        lora=lora,
        max_model_len=max_model_len,
        prefill_chunk=prefill_chunk,
        batched_tokens=prefill_chunk,  # one piece of a prompt a step: whoever decodes waits for no more
        remember=shared_memory,
    )
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    address = f"http://{host}:{sock.getsockname()[1]}"
    terminal.note(f"{name} at {address}/v1 with drafter {llm.drafter_name}; the page: {address}/; Ctrl-C ends")
    raise SystemExit(run(Server(llm, settings), sock))
