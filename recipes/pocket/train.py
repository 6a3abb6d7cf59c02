"""Train the pocket model: a small LLaMA that writes readable English and Python.

    python recipes/pocket/train.py train  --data FOLDER --work /tmp/pocket --tokens 12000000
    python recipes/pocket/train.py export --work /tmp/pocket --output src/selfdraft/models/pocket

FOLDER holds the sets that corpus.py reads, each below its own name.

`train` writes a checkpoint every few minutes and goes on from the newest one, so it can be killed at any moment;
a second run with another --tokens only moves the end of the learning-rate schedule. Same code on CPU and GPU.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corpus

END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 512  # tokens of a training window
POSITIONS = 4096  # what the rotary embedding is allowed to reach; beyond CONTEXT the text gets worse
app = typer.Typer(add_completion=False, help=__doc__)
Data = Annotated[Path, typer.Option(help="Folder with the text sets.")]
Work = Annotated[Path, typer.Option(help="Folder for the tokenizer, packed tokens and checkpoints.")]


@app.command()
def tokenizer(data: Data, work: Work, vocabulary: int = 4096) -> None:
    """Learn a byte-level BPE vocabulary and pack the corpus into token files."""
    work.mkdir(parents=True, exist_ok=True)
    texts = corpus.documents(data)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    learner = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, START_TURN, END_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, learner)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END_TURN, pad_token=END, model_max_length=POSITIONS
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(work / "tokenizer")
    for name, held_out in (("train", False), ("held_out", True)):
        part = [text for text in texts if corpus.is_held_out(text) == held_out]
        ids = [token for encoding in bpe.encode_batch(part) for token in (*encoding.ids, 0)]
        np.save(work / f"{name}.npy", np.array(ids, dtype=np.uint16))
        size = sum(len(text.encode()) for text in part)
        (work / f"{name}.json").write_text(json.dumps({"documents": len(part), "bytes": size, "tokens": len(ids)}))
        print(f"{name}: {len(part)} documents, {size} bytes, {len(ids)} tokens")


def build(vocabulary: int, width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 96,
        max_position_embeddings=POSITIONS,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal by Newton-Schulz steps (Jordan et al., 2024), in float32.

    torch.optim.Muon does these steps in bfloat16, which a CPU without bfloat16 units emulates: there it
    took five times as long as the forward and backward pass together.
    """

    def __init__(self, parameters: list[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, alike in by_shape.items():
                moves = []
                for parameter in alike:
                    memory = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    memory.lerp_(parameter.grad, 1 - group["momentum"])
                    moves.append(parameter.grad.lerp(memory, group["momentum"]))
                directions = orthogonal(torch.stack(moves)) * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(alike, directions, strict=True):
                    parameter.add_(direction, alpha=-group["lr"])


def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Matrices [b, m, n] with singular values moved near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(done: float, warm: float = 0.01, decay: float = 0.35) -> float:
    """Factor at a share `done` of the run: short warm-up, flat, linear descent at the end."""
    return min(1.0, done / warm + 1e-3, max(0.0, (1.0 - done) / decay))


def batch(tokens: np.ndarray, step: int, size: int, echoes: int) -> torch.Tensor:
    """Windows [size, CONTEXT + 1] of this step; epochs walk the windows in a seeded order.

    Each `echoes`-th repeats pieces of its text, so that the small model learns early to copy from its context.
    """
    windows = (len(tokens) - 1) // CONTEXT
    rows = []
    for number in range(step * size, (step + 1) * size):
        epoch, place = divmod(number, windows)
        shift = (epoch * 131) % CONTEXT  # other cuts in every epoch
        order = np.random.default_rng(epoch).permutation(windows - 1)
        start = int(order[place % (windows - 1)]) * CONTEXT + shift
        window = tokens[start : start + CONTEXT + 1]
        rows.append(torch.from_numpy((echo(window, number) if number % echoes == 0 else window).astype(np.int64)))
    return torch.stack(rows)


def echo(window: np.ndarray, number: int) -> np.ndarray:
    """The window's text with a piece of it coming back again and again, at irregular distances."""
    draw = np.random.default_rng(number)
    piece = window[: draw.integers(8, 128)]
    parts, size = [piece], len(piece)
    while size < len(window):
        start = draw.integers(0, len(window) - 64)
        parts += [window[start : start + draw.integers(0, 64)], piece]
        size += len(parts[-2]) + len(piece)
    return np.concatenate(parts)[: len(window)]


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, work: Path, most: int = 200) -> float:
    tokens = np.load(work / "held_out.npy")
    facts = json.loads((work / "held_out.json").read_text())
    total, count = 0.0, 0
    for start in range(0, min(len(tokens) - CONTEXT - 1, most * CONTEXT), CONTEXT):
        window = torch.from_numpy(tokens[start : start + CONTEXT + 1].astype(np.int64))[None]
        logits = model(input_ids=window[:, :-1]).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += CONTEXT
    return total / math.log(2) / (count * facts["bytes"] / facts["tokens"])


def save(path: Path, state: dict[str, object]) -> None:
    """Write beside, then rename: a kill leaves the old checkpoint whole."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


@app.command()
def train(
    data: Data,
    work: Work,
    tokens: int = 12_000_000,
    width: int = 192,
    layers: int = 12,
    batch_size: int = 8,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 50,
    threads: int = 2,
) -> None:
    """Train, or go on training from the newest checkpoint, until `tokens` tokens were seen."""
    if not (work / "train.npy").exists():
        tokenizer(data, work)
    torch.set_num_threads(threads)
    packed = np.load(work / "train.npy")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(4096, width, layers).to(device)
    rules = optimizers(model)
    base = [group["lr"] for rule in rules for group in rule.param_groups]
    path, step, seen = work / "checkpoint.pt", 0, 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for rule, saved in zip(rules, state["rules"], strict=True):
            rule.load_state_dict(saved)
        step, seen = state["step"], state["seen"]
    fast = torch.compile(model)
    while seen < tokens:
        began = time.perf_counter()
        factor = learning_rate(seen / tokens)
        for rate, group in zip(base, (g for rule in rules for g in rule.param_groups), strict=True):
            group["lr"] = rate * factor
        # many echoes first: after 3.7 M tokens without, nothing was copied; few at the end: the text got repetitive
        window = batch(packed, step, batch_size, 4 if factor == 1.0 else 16).to(device)
        logits = fast(input_ids=window[:, :-1], use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rule in rules:
            rule.step()
            rule.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + window[:, 1:].numel()
        if step % 10 == 0:
            speed = window[:, 1:].numel() / (time.perf_counter() - began)
            print(f"step {step} seen {seen} loss {loss.item():.3f} rate {factor:.3f} tokens/s {speed:.0f}", flush=True)
        if step % every == 0 or seen >= tokens:
            states = [rule.state_dict() for rule in rules]
            save(path, {"model": model.state_dict(), "rules": states, "step": step, "seen": seen})
            print(f"checkpoint {step} held-out bits per byte {bits_per_byte(fast, work, 20):.4f}", flush=True)


@app.command()
def export(
    work: Work, output: Annotated[Path, typer.Option(help="Folder to write.")], width: int = 192, layers: int = 12
) -> None:
    """Write safetensors (bfloat16), configuration, tokenizer and model card facts into `output`."""
    state = torch.load(work / "checkpoint.pt", weights_only=True, map_location="cpu")
    model = build(4096, width, layers)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16).to(torch.float32)  # measure what is shipped
    facts = {"tokens_seen": state["seen"], "held_out_bits_per_byte": round(bits_per_byte(model, work), 4)}
    facts |= {"parameters": sum(p.numel() for p in model.parameters())}
    facts |= {name: json.loads((work / f"{name}.json").read_text()) for name in ("train", "held_out")}
    output.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(output)
    model.generation_config.eos_token_id = [0, 2]
    model.generation_config.save_pretrained(output)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer", model_max_length=POSITIONS).save_pretrained(output)
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "README.md").write_text(card(facts, model.config))
    print(json.dumps(facts, indent=1))


def card(facts: dict[str, Any], config: LlamaConfig) -> str:
    """The model card, filled in with what was counted and measured."""
    return (
        (Path(__file__).parent / "card.md")
        .read_text()
        .format(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            vocabulary=config.vocab_size,
            parameters=facts["parameters"],
            tokens_seen=facts["tokens_seen"],
            context=CONTEXT,
            epochs=facts["tokens_seen"] / facts["train"]["tokens"],
            bits=facts["held_out_bits_per_byte"],
            held_documents=facts["held_out"]["documents"],
            held_bytes=facts["held_out"]["bytes"],
            documents=facts["train"]["documents"],
            bytes=facts["train"]["bytes"],
        )
    )


if __name__ == "__main__":
    app()
