"""Teacher-forced drafts are real drafts: the same tokens from every base, the same rounds when replayed."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from selfdraft.core.rows import pack
from selfdraft.core.sequence import Sequence, open_sequence
from selfdraft.core.tree import EMPTY
from selfdraft.drafters.layer_skip import LayerSkip
from selfdraft.engine.engine import Engine
from selfdraft.models.exactness import NATURAL, Shapes
from selfdraft.models.target import HFTarget
from selfdraft.tune.layer_skip.simulate import replay
from selfdraft.tune.layer_skip.teacher_forcing import Forced, Forcing, Text
from selfdraft.tune.layer_skip.tuner import Subject, own_texts
from selfdraft.types import Budget, SamplingParams, Skip
from tests.models import VOCAB, tiny_llama

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7]]
GREEDY = SamplingParams(max_tokens=40)
SAMPLED = SamplingParams(temperature=0.7, top_k=20, repetition_penalty=1.2, max_tokens=40, seed=7)
SKIPS = [Skip(frozenset({2})), Skip(frozenset({1, 3}), frozenset({2})), Skip(frozenset({2, 3}), frozenset({2, 3}))]


def texts_of(sampling: SamplingParams, target: HFTarget, prompts: SequenceOf[SequenceOf[int]] = PROMPTS) -> list[Text]:
    return own_texts(Subject(tiny_llama(), target, prompts), sampling)


def real_draft(target: HFTarget, text: Text, base: int, skip: Skip, depth: int, sampling: SamplingParams) -> list[int]:
    """What the drafter says in earnest when the text is known up to and with the token at `base`."""
    sequence = Sequence(list(text.tokens[: base + 1]), text.prompt_length, sampling, text.seed, slot=0)
    known = Sequence(sequence.tokens[:-1], text.prompt_length, sampling, slot=0)
    target.forward(pack([(known, base, EMPTY)]))
    target.keep(0, 0, range(base))
    sequence.num_cached = base
    drafter = LayerSkip(
        target, skip_attention=skip.attention, skip_mlp=skip.mlp, confidence_threshold=0.0, adaptive=False
    )
    return list(drafter.draft([sequence], [Budget(depth, depth, depth)])[0].tokens)


def sliding() -> MistralForCausalLM:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=7,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    return MistralForCausalLM(config).double().eval()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("chunk", [13, 1024])
def test_forced_drafts_are_real_drafts(sampling: SamplingParams, skip: Skip, chunk: int) -> None:
    """From every base: the first link always, deeper links as long as all before them are right."""
    target = HFTarget(tiny_llama())
    texts = texts_of(sampling, target)
    check_forced(tiny_llama(), target, texts, sampling, skip, chunk)


def test_forced_drafts_keep_to_the_window() -> None:
    model = sliding()
    target = HFTarget(model)
    texts = own_texts(Subject(model, target, PROMPTS), GREEDY)
    check_forced(model, target, texts, GREEDY, SKIPS[1], 1024)


def check_forced(
    model: LlamaForCausalLM | MistralForCausalLM,
    target: HFTarget,
    texts: SequenceOf[Text],
    sampling: SamplingParams,
    skip: Skip,
    chunk: int,
) -> None:
    forced = Forcing(model, texts, sampling, chunk).draft(skip, 4)
    single = Forcing(model, texts, sampling, chunk).draft(skip)
    assert torch.equal(single.drafts[:, 0], forced.drafts[:, 0])
    row = deep = 0
    for text in texts:
        for base in text.bases:
            real = real_draft(target, text, base, skip, 4, sampling)
            right = 0
            for link in range(4):
                if not forced.known[row, link]:
                    break
                assert int(forced.drafts[row, link]) == real[link], (base, link)
                deep += link > 0
                if real[link] != text.tokens[base + link + 1]:
                    break
                right += 1
            assert forced.right[row, :right].all()
            assert right == 4 or not forced.right[row, right]
            row += 1
    assert row == len(forced.right)
    assert deep > 10, "deeper links were compared, too"


@pytest.mark.parametrize("shapes", [Shapes(4, 16), NATURAL])
@pytest.mark.parametrize("drafts", [1, 3, 6])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_replay_has_the_rounds_of_real_drafting(shapes: Shapes, drafts: int, threshold: float) -> None:
    target = HFTarget(tiny_llama(), shapes=shapes)
    texts = texts_of(GREEDY, target)
    skip = Skip(frozenset({2}), frozenset({1}))
    forced = Forcing(tiny_llama(), texts, GREEDY).draft(skip, drafts)
    found = replay(texts, forced, drafts, threshold=threshold, edge=target.next_boundary)
    rounds = tokens = drafted = accepted = 0
    drafter = LayerSkip(
        target,
        skip_attention=skip.attention,
        skip_mlp=skip.mlp,
        num_speculative_tokens=drafts,
        confidence_threshold=threshold,
        adaptive=False,
    )
    for text in texts:
        sequence = open_sequence(
            text.tokens[: text.prompt_length], GREEDY, seed=0, eos=frozenset(), context=target.max_length
        )
        for _ in Engine(target, drafter).generate([sequence]):
            pass
        assert tuple(sequence.tokens) == text.tokens
        rounds += sequence.stats.num_steps - 1  # the prefill is no round
        tokens += sequence.stats.num_output_tokens - 1
        drafted += sequence.stats.num_draft_tokens
        accepted += sequence.stats.num_accepted_draft_tokens
    assert (found.rounds, found.tokens, found.accepted) == (rounds, tokens, accepted)
    assert accepted > 0
    if not threshold:
        assert found.links == drafted


def test_agreement_and_depth() -> None:
    right = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    known = torch.tensor([[True, True], [True, True], [True, True], [True, False]])
    forced = Forced(right.long(), right.float(), right, known)
    assert forced.agreement == 0.75
    assert forced.by_depth == [0.75, 0.5]  # of the three that were right, one ends; one of two goes on


def test_the_whole_model_agrees_with_itself() -> None:
    texts = texts_of(GREEDY, HFTarget(tiny_llama()))
    assert Forcing(tiny_llama(), texts, GREEDY).draft(Skip(), 3).by_depth == [1.0, 1.0, 1.0]
