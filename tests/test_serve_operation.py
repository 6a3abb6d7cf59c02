"""What an operator sees: metrics under both names, spans, the Grafana board, help."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from selfdraft.serve.app import Server
from selfdraft.serve.settings import Settings
from selfdraft.serve.tracing import tracer_from_environment
from tests.serving import pocket, serving, wait_until

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "A secretword story."}], "max_tokens": 30, "ignore_eos": True}
ROOT = Path(__file__).parent.parent
BOARD = ROOT / "deploy" / "grafana.json"


def value(text: str, name: str) -> float:
    """The value of a metric without labels."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found.group(1))


def test_metrics_agree_with_what_was_answered_under_both_names() -> None:
    with serving(
        pocket("merged", max_num_seqs=2), Settings(model_name="pocket", vllm_metrics=True, details=True)
    ) as served:
        answer = httpx.post(served.url + CHAT, json={**BODY, "draft_details": True}, timeout=600).json()
        counts = answer["metrics"]["speculative_decoding"]
        text = httpx.get(served.url + "/metrics").text
    for prefix in ("selfdraft_", "vllm:"):
        assert value(text, f"{prefix}spec_decode_num_draft_tokens_total") == counts["num_draft_tokens"]
        assert value(text, f"{prefix}spec_decode_num_accepted_tokens_total") == counts["num_accepted_draft_tokens"]
        assert value(text, f"{prefix}spec_decode_num_drafts_total") == counts["num_spec_steps"]
        places = re.findall(rf'{prefix}spec_decode_num_accepted_tokens_per_pos_total{{position="\d+"}} (\S+)', text)
        assert sum(map(float, places)) == counts["num_accepted_draft_tokens"]
    assert value(text, "selfdraft_generation_tokens_total") == 30
    assert value(text, "selfdraft_prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert value(text, "selfdraft_time_to_first_token_seconds_count") == 1


def test_the_board_reads_metrics_that_there_are() -> None:
    board = json.loads(BOARD.read_text())
    exported = Server(pocket("none", max_num_seqs=1), Settings(model_name="pocket")).metrics.text().decode()
    known = {*re.findall(r"^# TYPE (\S+)", exported, re.MULTILINE)}
    asked = re.findall(
        r"selfdraft_\w+", " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    )
    assert len(asked) > 10
    for name in asked:
        assert name in known or re.sub(r"_(bucket|sum|count|total)$", "", name) in known, name


def test_a_span_for_each_request_without_its_text() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    llm = pocket("merged", max_num_seqs=2)
    with serving(llm, Settings(model_name="pocket"), provider.get_tracer("test")) as served:
        httpx.post(served.url + CHAT, json=BODY, timeout=600)
        wait_until(lambda: len(exporter.get_finished_spans()) == 1)
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.output_tokens"] == 30
    assert span.attributes["selfdraft.finish_reason"] == "length"
    assert "secretword" not in span.to_json()


def test_without_an_endpoint_no_spans_are_made() -> None:
    assert tracer_from_environment() is None
