"""Answers as OpenAI's clients read them: whole documents, and the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from functools import partial

from selfdraft.core.detokenizer import TextStream
from selfdraft.core.sequence import Sequence
from selfdraft.core.verify import Result
from selfdraft.llm import LLM
from selfdraft.outputs import Piece, completion
from selfdraft.serve import tools as calling
from selfdraft.serve.service import Job
from selfdraft.serve.worker import Update, from_prediction
from selfdraft.types import Logprob

Document = dict[str, object]


class Writer:
    """Writes the answer of one job, piece by piece or whole. `chat` says in which of the two shapes."""

    def __init__(self, llm: LLM, job: Job, *, chat: bool) -> None:
        self.llm, self.job, self.chat = llm, job, chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._texts = [_Answer(llm, job, sequence) for sequence in job.call.sequences]
        self._begun: set[int] = set()

    # A stream

    def chunks(self, update: Update) -> Iterator[Document]:
        """The chunks of what a step brought to one answer."""
        index, piece, job = update.index, update.piece, self.job
        answer = self._texts[index]
        delta: Document = {}
        if index not in self._begun:
            self._begun.add(index)
            if self.chat:
                delta = {"role": "assistant", "content": ""}
            if job.echo and not self.chat:
                echo = self._choice_of(index, job.echo[index // job.n], None)
                yield {**self._head(stream=True), "choices": [echo]}
        text, calls = answer.grow(piece)
        if self.chat and calls:
            delta["tool_calls"] = [call.document(number) for number, call in enumerate(calls)]
        if text:
            delta["content"] = text
        reason = self._reason(piece.finish_reason, answer)
        if not (text or delta or reason or piece.logprobs or job.details or update.result):
            return
        choice = self._choice_of(index, delta if self.chat else text, reason)
        chunk: Document = {**self._head(stream=True), "choices": [choice]}
        if piece.finish_reason == "stop" and reason == "stop":
            choice["stop_reason"] = piece.stop_reason
        if job.logprobs:
            choice["logprobs"] = answer.logprobs(piece.logprobs, self.chat)
        if job.details:
            chunk["draft"] = answer.drafted(piece)
        if update.result is not None:
            chunk["draft_tree"] = self._tree(update.result, len(piece.token_ids))
        yield chunk

    def last_chunk(self) -> Document:
        """The chunk with the usage, behind all others."""
        return {**self._head(stream=True), "choices": [], "usage": usage(self.job), **self._metrics()}

    def _choice_of(self, index: int, delta: object, reason: str | None) -> Document:
        """What a chunk says of one answer."""
        return {"index": index, "delta" if self.chat else "text": delta, "logprobs": None, "finish_reason": reason}

    # A whole answer

    def document(self) -> Document:
        """The whole answer; only when the call has ended."""
        choices = [self._choice(index, sequence) for index, sequence in enumerate(self.job.call.sequences)]
        return {**self._head(stream=False), "choices": choices, "usage": usage(self.job), **self._metrics()}

    def _choice(self, index: int, sequence: Sequence) -> Document:
        said, answer = completion(index, sequence), self._texts[index]
        choice: Document = {"index": index}
        calls: list[calling.ParsedCall] = []
        if self.chat:
            content: str | None = said.text
            if self.job.names:
                content, calls = calling.parse_calls(said.text, self.job.form, self.job.names)
            answer.called = bool(calls)
            message: Document = {"role": "assistant", "content": (content or None) if calls else content}
            if calls:
                message["tool_calls"] = [call.document() for call in calls]
            choice["message"] = message
        else:
            choice["text"] = (self.job.echo[index // self.job.n] if self.job.echo else "") + said.text
        choice["logprobs"] = answer.logprobs(said.logprobs, self.chat) if self.job.logprobs else None
        choice["finish_reason"] = self._reason(said.finish_reason, answer)
        choice["stop_reason"] = said.stop_reason
        if self.job.details:
            tokens = zip(answer.texts_of(said.token_ids, last=True), said.sources, strict=True)
            choice["draft"] = {"tokens": [{"text": text, "source": source} for text, source in tokens]}
        return choice

    def _reason(self, reason: str | None, answer: _Answer) -> str | None:
        return "tool_calls" if reason is not None and answer.called else reason

    def _head(self, *, stream: bool) -> Document:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        head: Document = {"id": self.id, "object": kind, "created": self.created, "model": self.job.model}
        return head

    def _metrics(self) -> Document:
        """Counts of the request, under vLLM's names, where they are asked for."""
        if not self.job.details:
            return {}
        call = self.job.call
        counts = [sequence.stats.as_dict() for sequence in call.sequences]
        times = {
            "queue_seconds": None if call.admitted is None else round(call.admitted - call.arrived, 6),
            "first_token_seconds": None if call.first_token is None else round(call.first_token - call.arrived, 6),
        }
        return {"metrics": {"speculative_decoding": counts[0] if len(counts) == 1 else counts, **times}}

    def _tree(self, result: Result, emitted: int) -> Document:
        """The token tree of a step, with the texts of its tokens, and the path that became output."""
        draft, many = result.draft, result.draft.num_candidates
        decode = partial(self.llm.decode, skip_special_tokens=False)
        return {
            "tokens": [decode([token]) for token in draft.tokens[:many]],
            "parents": list(draft.parents[:many]),
            "sources": list(draft.sources[:many]),
            "probabilities": [round(one, 4) for one in draft.probabilities[:many]],
            "accepted": list(result.path[:emitted]),
            "bonus": decode([result.tokens[-1]]) if emitted == len(result.tokens) else "",
        }


class _Answer:
    """One answer on its way: its text by token, and the calls that may be in it."""

    def __init__(self, llm: LLM, job: Job, sequence: Sequence) -> None:
        self.llm, self.job, self.called = llm, job, False
        self._stream = TextStream(partial(llm.decode, skip_special_tokens=sequence.sampling.skip_special_tokens))
        self._held, self._offset = "", 0

    def grow(self, piece: Piece) -> tuple[str, list[calling.ParsedCall]]:
        """The text that may be shown now, and calls that are whole. With tools a text that may be a call waits."""
        if not self.job.names:
            return piece.text, []
        self._held += piece.text
        if piece.finish_reason is None and (self.job.forced_call or calling.opens_call(self._held, self.job.form)):
            return "", []
        text, self._held = self._held, ""
        calls: list[calling.ParsedCall] = []
        if piece.finish_reason is not None:
            text, calls = calling.parse_calls(text, self.job.form, self.job.names)
            self.called = bool(calls)
        return text, calls

    def texts_of(self, tokens: tuple[int, ...], *, last: bool) -> list[str]:
        """For each token the text that is certain since; what is certain only at the end is the last token's."""
        texts = []
        for number, token in enumerate(tokens, 1):
            size = self._stream.size
            self._stream.push(token)
            if last and number == len(tokens):
                self._stream.flush()
            texts.append(self._stream.since(size))
        return texts

    def drafted(self, piece: Piece) -> Document:
        """Who drafted each token of a piece."""
        texts = self.texts_of(piece.token_ids, last=piece.finish_reason is not None)
        pairs = zip(texts, piece.sources, strict=True)
        return {"tokens": [{"text": text, "source": source} for text, source in pairs]}

    def logprobs(self, found: tuple[Logprob, ...], chat: bool) -> Document:
        """Log-probabilities in the shape of chats or of text completions."""
        if chat:
            return {
                "content": [{**self._scored(one.token, one.logprob), "top_logprobs": self._top(one)} for one in found]
            }
        tokens = [self._word(one.token) for one in found]
        offsets = []
        for word in tokens:
            offsets.append(self._offset)
            self._offset += len(word)
        top = [{self._word(token): _finite(score) for token, score in one.top} for one in found]
        scores = [_finite(one.logprob) for one in found]
        return {"tokens": tokens, "token_logprobs": scores, "top_logprobs": top, "text_offset": offsets}

    def _top(self, one: Logprob) -> list[Document]:
        return [self._scored(token, score) for token, score in one.top]

    def _scored(self, token: int, score: float) -> Document:
        word = self._word(token)
        return {"token": word, "logprob": _finite(score), "bytes": list(word.encode("utf-8", "replace"))}

    def _word(self, token: int) -> str:
        return self.llm.decode([token], skip_special_tokens=False)


def usage(job: Job) -> Document:
    """Token counts of a job. Only tokens of a prediction count as accepted or rejected ones of it."""
    call, sequences = job.call, job.call.sequences
    prompt = sum(sequence.prompt_length for sequence in sequences[:: job.n])
    written = sum(sequence.num_output_tokens for sequence in sequences)
    kept = sum(from_prediction(source) for sequence in sequences for source in sequence.sources)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(s.stats.num_cached_tokens for s in sequences)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": kept,
            "rejected_prediction_tokens": max(call.predicted - kept, 0),
            "reasoning_tokens": 0,
        },
    }


def _finite(score: float) -> float:
    """A log-probability as JSON can have it: banned tokens have minus infinity."""
    return max(score, -9999.0)


def event(document: Document) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def padded(events: bytes, size: int) -> bytes:
    """Events and a comment, which clients skip, as a multiple of `size` bytes: their length tells of no tokens."""
    return events + b": " + b"x" * (-(len(events) + 4) % size) + b"\n\n" if size else events
