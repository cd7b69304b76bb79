"""Train the byte-level Llama that `dca-ext demo` ships: 0.4M parameters, a context of 128 bytes, one CPU core.

    python bench/quality/train_tiny.py --seeds 0 1 2 --out build/tiny

The model must do one thing perfectly inside its 128 bytes: find something it read earlier and say it again. So a
batch mixes plain text with three retrieval tasks (passkeys in text, random strings repeated, passages repeated).
Retrieval needs two layers that work together (an induction head), which appears suddenly after a plateau. On rows of
128 bytes that plateau outlasted 1800 steps; on rows of 32 bytes it ended after some 200. Hence the short rows at the
start, and most of the run on full rows, well past that point.

Each seed writes OUT/seed-N/{config.json,model.safetensors,training.json,figures.json}; the last holds what act 1 of
the demo measures. Interrupted runs continue from OUT/seed-N/checkpoint.pt when the same command is given again, and
end with the same weights as an uninterrupted one; for a finished seed the command only measures again.
`--ship N FOLDER` writes a trained seed as fp16 where the package keeps it.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import platform
import random
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from dca_ext.cli import act_tiny, tables
from dca_ext.cli.tasks import KEY_DIGITS, describe_text, exact_matches, passkey_row, to_bytes, topics_text

CONTEXT = 128
CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class Stage:
    """A part of the run: it begins at a share of the steps, with rows of `length` bytes of several kinds."""

    begins: float
    length: int
    mixture: dict[str, float]


CURRICULUM = (
    Stage(0.0, 32, {"text": 0.2, "copy_random": 0.8}),
    Stage(0.1, 64, {"text": 0.3, "copy_random": 0.3, "copy_text": 0.2, "passkey": 0.2}),
    Stage(0.2, CONTEXT, {"text": 0.4, "copy_random": 0.2, "copy_text": 0.15, "passkey": 0.25}),
)


def model_config() -> LlamaConfig:
    """Two layers, hidden 128, two heads of 64 over one KV head: just enough for an induction head."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def training_text() -> str:
    """The topics that are not held out, then every docstring of the standard library's top-level modules."""
    parts = [topics_text("train")]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node)
                if docstring:
                    parts.append(docstring)
    return "\n\n".join(parts)


class Rows:
    """Draws training rows of bytes; all randomness comes from one `random.Random`, so its state is the state."""

    def __init__(self, text: torch.Tensor, seed: int) -> None:
        self.text = text
        self.rng = random.Random(seed)

    def plain(self, length: int) -> torch.Tensor:
        start = self.rng.randrange(len(self.text) - length + 1)
        return self.text[start : start + length]

    def repeated(self, passage: torch.Tensor, length: int) -> torch.Tensor:
        """Text, the passage, text, the passage again, and as much of further copies as the row has room for."""
        room = length - 2 * len(passage)
        before = self.rng.randrange(room + 1)
        between = self.rng.randrange(room - before + 1)
        copies = passage.repeat(length // len(passage))
        return torch.cat([self.plain(before), passage, self.plain(between), copies])[:length]

    def copy_random(self, length: int) -> torch.Tensor:
        """A random string of printable bytes: only retrieval can predict its second copy."""
        alphabet = range(48, 58) if self.rng.random() < 0.3 else range(33, 127)
        count = self.rng.randrange(4, length // 2)
        return self.repeated(torch.tensor([self.rng.choice(alphabet) for _ in range(count)]), length)

    def copy_text(self, length: int) -> torch.Tensor:
        return self.repeated(self.plain(self.rng.randrange(12, length // 2)), length)

    def draw(self, stage: Stage) -> torch.Tensor:
        kind = self.rng.choices(list(stage.mixture), weights=list(stage.mixture.values()))[0]
        if kind == "text":
            return self.plain(stage.length)
        if kind == "passkey":
            return passkey_row(self.text, stage.length, self.rng.random(), self.rng)
        return self.copy_random(stage.length) if kind == "copy_random" else self.copy_text(stage.length)

    def batch(self, stage: Stage, tokens: int) -> torch.Tensor:
        """(tokens / stage.length, stage.length) int64."""
        return torch.stack([self.draw(stage) for _ in range(max(1, tokens // stage.length))])


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def measure(model: LlamaForCausalLM, text: torch.Tensor, rows: int = 256) -> dict[str, float]:
    """Inside the training context, on held-out text: bits per byte, and the share of passkeys answered exactly."""
    rng = random.Random(12345)
    starts = [rng.randrange(len(text) - CONTEXT) for _ in range(rows)]
    windows = torch.stack([text[s : s + CONTEXT] for s in starts])
    prompts = torch.stack([passkey_row(text, CONTEXT, rng.random(), rng) for _ in range(rows)])
    logits = model(windows).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    answers = model(prompts).logits[:, -KEY_DIGITS - 1 : -1].argmax(-1)
    exact = exact_matches(answers, prompts[:, -KEY_DIGITS:])
    return {"bits_per_byte": loss.item() / math.log(2), "passkey_exact": exact.float().mean().item()}


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW; gains and the tied embedding are not decayed."""
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    kept = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the file, then rename, so that an interrupt never leaves half a file."""
    partial = path.with_suffix(path.suffix + ".part")
    write(partial)
    os.replace(partial, path)


class Run:
    """One seed's model, optimizer and rows, kept in FOLDER/checkpoint.pt between steps."""

    def __init__(self, seed: int, folder: Path, args: argparse.Namespace, text: torch.Tensor) -> None:
        self.args = args
        self.folder = folder
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(model_config())
        self.optimizer = make_optimizer(self.model)
        self.rows = Rows(text, seed)
        self.record: dict = {"seed": seed, "log": [], "seconds": 0.0}
        self.step = 0

    def restore(self) -> None:
        """Continues where the checkpoint stopped, if there is one."""
        path = self.folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=False)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.rows.rng.setstate(state["rng"])
            self.record, self.step = state["record"], state["step"]
            print(f"seed {self.record['seed']}: continuing at step {self.step}", flush=True)

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"rng": self.rows.rng.getstate(), "record": self.record, "step": self.step}
        replace_file(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def train_step(self) -> float:
        """One batch; returns its loss in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.args.steps, self.args.lr, self.args.warmup)
        stage = [stage for stage in CURRICULUM if self.step >= stage.begins * self.args.steps][-1]
        batch = self.rows.batch(stage, self.args.batch_tokens)
        logits = self.model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def note(self, loss: float, seconds: float, held_out: torch.Tensor) -> None:
        """Measures on held-out text, prints, and adds to the record."""
        entry = {"step": self.step, "train_loss": round(loss, 4), **measure(self.model, held_out)}
        self.record["log"].append(entry)
        self.record["seconds"] = round(seconds, 1)
        left = seconds / self.step * (self.args.steps - self.step)
        print(
            f"seed {self.record['seed']} step {self.step}/{self.args.steps}: training loss {loss:.3f}, held-out "
            f"{entry['bits_per_byte']:.3f} bits/byte, passkey {entry['passkey_exact']:.3f}, {left / 60:.0f} min left",
            flush=True,
        )


def train_seed(seed: int, args: argparse.Namespace, text: torch.Tensor, held_out: torch.Tensor) -> None:
    """Trains one seed to the end, or continues it."""
    folder = args.out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(seed, folder, args, text)
    run.restore()
    began = time.time() - run.record["seconds"]
    while run.step < args.steps:
        loss = run.train_step()
        if run.step % CHECKPOINT_EVERY == 0 or run.step == args.steps:
            run.note(loss, time.time() - began, held_out)
            run.save()
    run.model.save_pretrained(folder)
    replace_file(folder / "training.json", lambda path: path.write_text(json.dumps(run.record, indent=1)))


def measure_beyond(seed: int, out: Path, budget: act_tiny.Budget) -> None:
    """What act 1 of the demo measures, of one trained seed: printed, and written to figures.json."""
    folder = out / f"seed-{seed}"
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    figures = act_tiny.measure(model, 0, budget)
    replace_file(folder / "figures.json", lambda path: path.write_text(json.dumps(figures, indent=1)))
    console = Console(width=110)
    console.rule(f"seed {seed}")
    for table in tables.tiny_tables(figures):
        console.print(table)


def ship(seed: int, out: Path, folder: Path) -> None:
    """Write a trained seed as fp16 safetensors and config.json into `folder`."""
    model = LlamaForCausalLM.from_pretrained(out / f"seed-{seed}").half()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    size = weights.stat().st_size
    print(f"seed {seed}: {size} bytes of fp16 weights in {folder}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="bytes per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--threads", type=int, default=1, help="the same figures need the same number of threads")
    parser.add_argument("--out", type=Path, default=Path("build/tiny"))
    parser.add_argument("--windows", type=int, default=24, help="text windows per length, when measuring")
    parser.add_argument("--prompts", type=int, default=40, help="passkey prompts per depth and length, when measuring")
    parser.add_argument(
        "--ship", nargs=2, metavar=("SEED", "FOLDER"), help="do not train; write SEED as fp16 to FOLDER"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.ship:
        ship(int(args.ship[0]), args.out, Path(args.ship[1]))
        return 0
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    corpus = training_text()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, training text {describe_text(corpus)}")
    text, held_out = to_bytes(corpus), to_bytes(topics_text("held_out"))
    try:
        for seed in args.seeds:
            train_seed(seed, args, text, held_out)
            measure_beyond(seed, args.out, act_tiny.Budget(args.windows, args.prompts))
    except KeyboardInterrupt:
        print(f"interrupted; the same command continues from the last checkpoint in {args.out}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
