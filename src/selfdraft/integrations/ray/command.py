"""`selfdraft serve --ray`: starts Ray where it does not run, the application on it, and ends both again."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from selfdraft.cli import terminal
from selfdraft.cli.options import check_options, ensure_installed
from selfdraft.cli.serve import ServeOptions, settings_of
from selfdraft.errors import LoadError
from selfdraft.integrations.ray.application import REPLICAS, application, cpus_of
from selfdraft.integrations.ray.cluster import cluster_address, last_line, start_ray
from selfdraft.serve.run import bind

NAME = "selfdraft"
"""The application's name in `serve status`."""
KEEP_ALIVE = 30
LOGS = {"log_level": "WARNING", "enable_access_log": False}
"""Of Ray Serve's own processes; they go into the files of Ray's session. Requests are logged by the gateway."""


@dataclass(slots=True)
class Signals:
    """What the operator has asked for since it was last looked at."""

    changed: threading.Event
    end: bool = False
    restart: bool = False

    @classmethod
    def listening(cls) -> Signals:
        """SIGTERM and Ctrl-C end, SIGHUP restarts all replicas."""
        found = cls(threading.Event())

        def heard(number: int, frame: object) -> None:
            if number == signal.SIGHUP:
                found.restart = True
            else:
                if found.end:
                    raise KeyboardInterrupt  # a second signal does not wait for requests
                found.end = True
            found.changed.set()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, heard)
        return found


def run_on_ray(given: ServeOptions) -> int:
    """Serve until a signal comes; the exit status. Errors: OptionError, LoadError before anything is served."""
    check_options(given.model, given.drafter, given.speculative_config, given.dtype, given.lora)
    application(given)  # broken options are said before anything is started
    sock = bind(given.host, given.port)
    port = sock.getsockname()[1]
    sock.close()
    ensure_installed(given.model)
    most = given.max_replicas or given.replicas
    # replicas that start while old ones still end are in Ray's count, too
    start_ray((most + 1) * cpus_of(given))
    try:
        start_serve(given, port)
        return serve_until_signalled(given, f"http://{given.host}:{port}")
    except KeyboardInterrupt:
        return 130
    finally:
        if cluster_address() is None:
            serve.shutdown()  # and not on a cluster of others, whose applications it would end
        ray.shutdown()


def start_serve(given: ServeOptions, port: int) -> None:
    """The application, running. Errors: LoadError when a replica cannot start."""
    where = ProxyLocation.EveryNode if cluster_address() else ProxyLocation.HeadOnly
    serve.start(where, HTTPOptions(host=given.host, port=port, keep_alive_timeout_s=KEEP_ALIVE), logging_config=LOGS)
    deploy(given, "")


def deploy(given: ServeOptions, restart: str) -> None:
    """Bring the application to these options. Errors: LoadError when a replica cannot start."""
    with terminal.waiting(f"starting {given.replicas} replicas of {given.model}"):
        try:
            serve.run(application(given, restart=restart), name=NAME, route_prefix="/", logging_config=LOGS)
        except RuntimeError as error:
            raise LoadError(f"a replica cannot start: {_why(error)}") from error


def serve_until_signalled(given: ServeOptions, address: str) -> int:
    """Restart replicas when that is asked for, until the end is; the exit status."""
    settings, signals, restarts = settings_of(given), Signals.listening(), 0
    most = f" to {given.max_replicas}" if given.max_replicas else ""
    terminal.note(f"{settings.model_name} at {address}/v1 from {given.replicas}{most} replicas; Ctrl-C ends")
    while not signals.end:
        signals.changed.wait()
        signals.changed.clear()
        if signals.restart and not signals.end:
            signals.restart, restarts = False, restarts + 1
            terminal.note("restarting all replicas, one after the other")
            deploy(given, str(restarts))
            terminal.note("all replicas are new")
    terminal.note(f"ending: requests have {given.shutdown_timeout:g} seconds")
    serve.delete(NAME)
    return 0


def _why(error: RuntimeError) -> str:
    """What Ray knows of a deployment that failed, in one line: the last line of the traceback."""
    found = serve.status().applications.get(NAME)
    told = found.deployments[REPLICAS].message if found and REPLICAS in found.deployments else ""
    return last_line(told or error)
