"""Ray Serve LLM with one of our drafters: replicas of vLLM behind an API as OpenAI has it, on this machine's processor.

    ~/vllm/bin/python recipes/ray_llm.py MODEL --drafter merged --port 8000

`MODEL`: a checkpoint folder, or a name on the hub. Nothing is patched: `engine_args` goes where `LLMConfig` takes the
arguments of vLLM. It runs until Ctrl-C. Needs an environment as docs/vllm.md makes it. On GPUs leave out
`accelerator_config`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Of all processes, where they are not set: 1 GB of keys and values, threads that the system places."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", default="model", help="what clients call it")
    parser.add_argument("--drafter", help="a drafter of docs/vllm.md; without one vLLM decodes as it is")
    parser.add_argument("--options", type=json.loads, default={}, help="of the drafter, as JSON")
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vLLM, as JSON")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--metrics-port", type=int, help="where Ray tells vLLM's counters, at /metrics")
    given = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # processes of Ray inherit them
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    from selfdraft.integrations.vllm import engine_args

    drafting = engine_args(given.drafter, **given.options) if given.drafter else {}
    config = LLMConfig(
        model_loading_config={"model_id": given.name, "model_source": given.model},
        accelerator_config={"kind": "cpu"},
        deployment_config={"num_replicas": given.replicas},
        engine_kwargs={**given.engine, **drafting},
    )
    cores = 2 * given.replicas + 2  # as Ray counts them: it waits for more than a small machine has
    ray.init(num_cpus=cores, include_dashboard=False, _metrics_export_port=given.metrics_port)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": given.port})
        serve.run(build_openai_app({"llm_configs": [config]}), name="llm")
        print(f"{given.name} at http://127.0.0.1:{given.port}/v1; Ctrl-C ends", flush=True)
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
