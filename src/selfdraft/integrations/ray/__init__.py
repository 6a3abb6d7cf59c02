"""Replicas of the server on Ray Serve, and files of prompts on Ray Data: `serve run selfdraft.integrations.ray:app`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdraft.errors import SelfdraftError

if TYPE_CHECKING:
    from ray.serve import Application


def app(args: dict[str, object]) -> Application:
    """The application for `serve run` and for config files of Ray Serve; `args` are options of `selfdraft serve`.

    Names are those of the command line with underscores, and two more: `restart`, any text, which starts all replicas
    anew, one after the other, when it changes; `gateways`, how many of those there are.
    Errors: OptionError, also where Ray is missing or its version is not supported. Inside the command `serve run`
    click.ClickException, which it shows as one line, and LoadError is one, too, where a model's folder is missing.
    """
    from selfdraft.integrations.ray.required import check_ray

    check_ray()
    from selfdraft.cli import inside_click
    from selfdraft.integrations.ray.application import application_of

    by_command = inside_click.running()
    try:
        return application_of(args, here=by_command)  # elsewhere it may be built on a machine that has no model
    except SelfdraftError as error:
        if not by_command:
            raise
        raise inside_click.as_one_line(error) from error
