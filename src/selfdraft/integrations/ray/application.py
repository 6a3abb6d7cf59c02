"""The application of Ray Serve: a gateway in front of replicas, and how Ray is told to route, scale and end them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from selfdraft.cli.options import check_options
from selfdraft.cli.serve import ServeOptions, settings_of
from selfdraft.errors import OptionError, shown
from selfdraft.integrations.ray.gateway import Gateway
from selfdraft.integrations.ray.replica import Replica
from selfdraft.integrations.ray.routing import ConversationRouter
from selfdraft.integrations.ray.scaling import LoadPolicy
from selfdraft.types import within

GATEWAY, REPLICAS = "gateway", "replicas"
"""Names of the two deployments, as `serve status` shows them."""
ASIDE = 32
"""Requests beside those for answers that a replica takes at the same time: lists of models, tokens, pages."""
GATEWAY_REQUESTS = 10_000
"""Requests that one gateway holds at once; how many wait for an answer is bounded by the replicas."""
CONSTRUCTIONS = 3
"""Times that Ray tries to start a replica before it says that it cannot."""
ENDING = 5.0
"""Seconds that the gateway has longer than replicas, to send what they said last."""
SLOWER = 20
"""How many times as long load must be gone before replicas go, as it must last before they come."""
LISTS = ("adapter", "api_key", "allowed_host", "cors_origin")
"""Options that may be given several times; as one text, with commas."""
TOKENS = 1024
"""Tokens in flight for each answer of a batch, where --target-tokens does not say it."""


def application_of(args: Mapping[str, object], *, here: bool = False) -> serve.Application:
    """The application for options of `selfdraft serve` by name, `restart` and `gateways`.

    `here`: the model is on this machine, too. Errors: OptionError, LoadError.
    """
    given = dict(args)
    restart, gateways = str(given.pop("restart", "")), str(given.pop("gateways", 1))
    if not gateways.isdecimal() or not int(gateways):
        raise OptionError(f"gateways={shown(gateways)} is not a whole number above 0")
    options = options_from(given)
    if here:
        check_options(options.model, options.drafter, options.speculative_config, options.dtype, options.lora)
    return application(options, restart=restart, gateways=int(gateways))


def options_from(args: Mapping[str, object]) -> ServeOptions:
    """Options of `selfdraft serve` out of names and values, which may be texts. Errors: OptionError."""
    known = {field.name: field for field in fields(ServeOptions)}
    if unknown := next((name for name in args if name not in known or name in ("ray", "port")), None):
        raise OptionError(
            f"{unknown!r} is not an option here; these are: {', '.join(sorted({*known} - {'ray', 'port'}))}"
        )
    read = {name: _several(value) if name in LISTS else value for name, value in args.items()}
    try:
        return TypeAdapter(ServeOptions).validate_python(read)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise OptionError(f"{fault['loc'][0]}: {fault['msg']}") from error


def application(given: ServeOptions, *, restart: str = "", gateways: int = 1) -> serve.Application:
    """The application for these options. `restart`: replicas are started anew when it changes. Errors: OptionError."""
    settings = settings_of(given)
    # keys are read here and travel inside the cluster: their file need not be on every node
    given = replace(given, api_key=[*settings.keys] or None, api_key_file=None)
    _check(given)
    # without --threads torch takes as many as Ray keeps: Ray sets OMP_NUM_THREADS
    actor = {"num_cpus": cpus_of(given), "num_gpus": given.replica_gpus}
    sized: dict[str, object] = {"num_replicas": given.replicas}
    if given.max_replicas is not None:
        sized = {"autoscaling_config": _scaling(given)}
    replicas = serve.deployment(
        Replica,
        name=REPLICAS,
        ray_actor_options=actor,
        max_ongoing_requests=given.max_batch + given.max_queue + ASIDE,
        max_queued_requests=given.max_batch + given.max_queue,
        request_router_config=RequestRouterConfig(
            request_router_class=ConversationRouter, request_router_kwargs={"slots": given.max_batch}
        ),
        graceful_shutdown_timeout_s=given.shutdown_timeout,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        max_constructor_retry_count=CONSTRUCTIONS,
        **sized,
    )
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name=GATEWAY,
        num_replicas=gateways,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=given.shutdown_timeout + ENDING,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return gateway.bind(replicas.bind(given, restart), given)


def cpus_of(given: ServeOptions) -> float:
    """Processors that Ray keeps for one replica."""
    return float(given.threads or 1) if given.replica_cpus is None else given.replica_cpus


def _several(value: object) -> object:
    """Several values out of a text with commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _check(given: ServeOptions) -> None:
    """Errors: OptionError."""
    within("replicas", given.replicas, 1, 4096)
    if given.max_replicas is not None and given.max_replicas < given.replicas:
        raise OptionError(f"--max-replicas {given.max_replicas} is less than --replicas {given.replicas}")
    if given.max_replicas is None and (given.target_requests or given.target_tokens):
        raise OptionError("--target-requests and --target-tokens say when to scale: give --max-replicas, too")
    for name in ("target_requests", "target_tokens"):
        if (value := getattr(given, name)) is not None:
            within(name, value, 0.01, 1e9)


def _scaling(given: ServeOptions) -> AutoscalingConfig:
    """Between --replicas and --max-replicas, by what runs and waits."""
    requests = given.target_requests or float(given.max_batch)
    tokens = given.target_tokens or float(TOKENS * given.max_batch)
    return AutoscalingConfig(
        min_replicas=given.replicas,
        max_replicas=given.max_replicas,
        target_ongoing_requests=requests,
        upscale_delay_s=given.scale_delay,
        downscale_delay_s=SLOWER * given.scale_delay,
        policy=AutoscalingPolicy(
            policy_function=LoadPolicy, policy_kwargs={"target_requests": requests, "target_tokens": tokens}
        ),
    )
