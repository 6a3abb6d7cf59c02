"""Our drafters as proposers of a stock vLLM: `speculative_config={"model": "selfdraft.integrations.vllm.Merged", ...}`.

docs/vllm.md shows them in use. `engine_args` makes and checks the arguments; `Worker` is what `worker_cls` names.
"""

from __future__ import annotations

import difflib

from selfdraft.errors import OptionError
from selfdraft.integrations.vllm.proposers import Context, LayerSkip, Lookup, Merged, Prediction, Suffix
from selfdraft.integrations.vllm.settings import PROPOSERS, engine_args

__all__ = ["Context", "LayerSkip", "Lookup", "Merged", "Prediction", "Suffix", "Worker", "engine_args"]


def __getattr__(name: str) -> object:
    """`Worker`, which needs vLLM. Errors: OptionError for a class that is not there: vLLM looks it up by its name."""
    if name == "Worker":
        from selfdraft.integrations.vllm.worker import worker_class

        return worker_class()
    if name[:1].isupper():
        near = difflib.get_close_matches(name, PROPOSERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise OptionError(f"there is no proposer {name!r} for vLLM{hint} There are: {', '.join(PROPOSERS)}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
