"""Replicas of the server on Ray Serve, and files of prompts on Ray Data: `serve run selfdraft.integrations.ray:app`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: dict[str, object]) -> Application:
    """The application for `serve run` and for config files of Ray Serve; `args` are options of `selfdraft serve`.

    Names are those of the command line with underscores, and two more: `restart`, any text, which starts all replicas
    anew, one after the other, when it changes; `gateways`, how many of those there are.
    Errors: OptionError, also where Ray is missing or its version is not supported.
    """
    from selfdraft.integrations.ray.required import check_ray

    check_ray()
    from selfdraft.integrations.ray.application import application_of

    return application_of(args)
