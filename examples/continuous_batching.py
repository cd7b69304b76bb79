"""Continuous batching over a paged KV cache: an inference engine of one's own on top of the operators.

Requests come and go. Every step takes a piece of a prompt from some of them and one token from the others, packs all
into one ragged batch and runs the model once. Requests that begin alike share the pages of what they have in common:
a cached key is rotated by its position in its chunk, which no later token changes.

    python examples/continuous_batching.py

runs four requests through the small model that comes with the package, two of them about the same document, all of
them several times as long as that model's context, and compares what they get with `model.generate`.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dca_ext import DCAConfig, dca_attention_with_kvcache, replace_attention, rotary_tables

PAGE_SIZE = 16  # slots; CUDA kernels take multiples of 16


@dataclass
class Request:
    """A prompt, what has been generated behind it, and where its keys and values lie."""

    tokens: list[int]
    max_new_tokens: int
    prompt_len: int = 0
    cached: int = 0  # tokens whose keys and values are in the pages
    shared: int = 0  # of these, what another request had already written
    pages: list[int] = field(default_factory=list)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def done(self) -> bool:
        return len(self.answer) == self.max_new_tokens


class PagePool:
    """Which pages are free, how many requests use the others, and which of those hold what."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages))
        self.users = [0] * num_pages
        self.by_content: dict[tuple[int, ...], int] = {}  # (page before it or -1, its tokens) -> page
        self.content: dict[int, tuple[int, ...]] = {}

    def take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def shared(self, before: int, tokens: list[int]) -> int | None:
        """The page with these tokens behind those of the page `before`, for one user more."""
        page = self.by_content.get((before, *tokens))
        if page is not None:
            self.users[page] += 1
        return page

    def publish(self, page: int, before: int, tokens: list[int]) -> None:
        """Lets others use a full page."""
        key = (before, *tokens)
        if key not in self.by_content:
            self.by_content[key] = page
            self.content[page] = key

    def release(self, page: int) -> None:
        self.users[page] -= 1
        if self.users[page] == 0:
            self.by_content.pop(self.content.pop(page, ()), None)
            self.free.append(page)


class Engine:
    """Runs requests through a Hugging Face Llama model, whose attention layers it does itself."""

    def __init__(self, model: Any, dca_config: DCAConfig, num_pages: int, tokens_per_step: int = 256) -> None:
        self.model = model
        self.dca_config = dca_config
        self.tokens_per_step = tokens_per_step
        self.pool = PagePool(num_pages)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        config, device = model.config, model.device
        self.rotary = rotary_tables(config, dca_config.max_position, device=device)
        pages = (num_pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        self.caches = [
            (torch.empty(pages, dtype=model.dtype, device=device), torch.empty(pages, dtype=model.dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]

    def submit(self, prompt: list[int], max_new_tokens: int) -> Request:
        request = Request(list(prompt), max_new_tokens, prompt_len=len(prompt))
        if self._pages_for(request) > len(self.pool.users):
            raise ValueError(f"the request needs {self._pages_for(request)} pages; there are {len(self.pool.users)}")
        self.waiting.append(request)
        return request

    def run(self) -> int:
        """Steps until every request is done; returns how many."""
        steps = 0
        while self.waiting or self.running:
            self.step()
            steps += 1
        return steps

    def step(self) -> None:
        """One pass of the model: the next token of every running request, or the next piece of its prompt."""
        while self.waiting and self._admit(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
        # Requests that are generating have one token due, and go first; prompts share what is left of the step.
        batch: list[tuple[Request, int]] = []
        room = self.tokens_per_step
        for request in sorted(self.running, key=lambda r: len(r.tokens) - r.cached):
            due = min(len(request.tokens) - request.cached, room)
            if due > 0:
                batch.append((request, due))
                room -= due
        next_tokens = self._forward(batch)
        for (request, due), token in zip(batch, next_tokens, strict=True):
            self._note_cached(request, due)
            if request.cached == len(request.tokens):
                request.tokens.append(token)
            if request.done:
                self.running.remove(request)
                for page in request.pages:
                    self.pool.release(page)

    # --- Pages ---

    def _pages_for(self, request: Request) -> int:
        slots = request.prompt_len + request.max_new_tokens - 1  # the last token is not read again
        return -(-slots // PAGE_SIZE)

    def _admit(self, request: Request) -> bool:
        """Gives the request all pages that it will ever need, shared ones first, if there are enough."""
        pages: list[int] = []
        full = (request.prompt_len - 1) // PAGE_SIZE  # of the last prompt token logits are wanted, so it is computed
        for i in range(full):
            tokens = request.tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
            page = self.pool.shared(pages[-1] if pages else -1, tokens)
            if page is None:
                break
            pages.append(page)
        needed = self._pages_for(request) - len(pages)
        if needed > len(self.pool.free):
            for page in pages:
                self.pool.release(page)
            return False
        request.cached = request.shared = len(pages) * PAGE_SIZE
        request.pages = pages + [self.pool.take() for _ in range(needed)]
        return True

    def _note_cached(self, request: Request, count: int) -> None:
        first = request.cached // PAGE_SIZE
        request.cached += count
        for i in range(first, request.cached // PAGE_SIZE):
            tokens = request.tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
            self.pool.publish(request.pages[i], request.pages[i - 1] if i > 0 else -1, tokens)

    # --- The model ---

    @torch.inference_mode()
    def _forward(self, batch: list[tuple[Request, int]]) -> list[int]:
        """Runs the due tokens of all requests as one ragged batch -> the likeliest token behind each."""
        llama, device = self.model.model, self.model.device
        ids = [token for request, due in batch for token in request.tokens[request.cached : request.cached + due]]
        ends = torch.tensor([0] + [due for _, due in batch]).cumsum(0)
        width = max(len(request.pages) for request, _ in batch)
        table = [request.pages + [0] * (width - len(request.pages)) for request, _ in batch]
        where = {
            "cache_seqlens": torch.tensor([request.cached for request, _ in batch], dtype=torch.int32, device=device),
            "cu_seqlens_q": ends.to(device, torch.int32),
            "max_seqlen_q": max(due for _, due in batch),
            "page_table": torch.tensor(table, dtype=torch.int32, device=device),
        }
        hidden = llama.embed_tokens(torch.tensor(ids, device=device))
        for layer, (k_cache, v_cache) in zip(llama.layers, self.caches, strict=True):
            hidden = hidden + self._attention(layer, layer.input_layernorm(hidden), k_cache, v_cache, where)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        last_rows = llama.norm(hidden[ends[1:].to(device) - 1])
        return self.model.lm_head(last_rows).argmax(-1).tolist()

    def _attention(self, layer: Any, x: Tensor, k_cache: Tensor, v_cache: Tensor, where: dict[str, Any]) -> Tensor:
        attention = layer.self_attn
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.model.config.head_dim))  # (tokens, heads, head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        # Rotates and appends k and v, then attends; without new keys it would only attend.
        out = dca_attention_with_kvcache(q, k_cache, v_cache, *self.rotary, self.dca_config, k=k, v=v, **where)
        return attention.o_proj(out.flatten(-2))


def prompts() -> list[list[int]]:
    """Bytes that end with a question whose answer, five digits, stands somewhere before: two about one document."""
    from dca_ext.cli.tasks import KEY_DIGITS, QUESTION, passkey_row, to_bytes, topics_text

    text, rng = to_bytes(topics_text("held_out")), random.Random(0)
    document, *others = (passkey_row(text, length, 0.6, rng)[:-KEY_DIGITS].tolist() for length in (600, 350, 500))
    return [document, document[:450] + to_bytes(QUESTION).tolist(), *others]


def main() -> None:
    """Runs the requests and prints what became of them."""
    from transformers.utils import logging

    from dca_ext.cli.act_tiny import load_tiny
    from dca_ext.cli.devices import pick_device

    logging.set_verbosity_error()  # it would remark that the prompts are longer than the context
    model = load_tiny(pick_device(None))
    dca_config = DCAConfig.from_pretraining_length(model.config.max_position_embeddings)
    engine = Engine(model, dca_config, num_pages=160)
    print(f"context {model.config.max_position_embeddings} tokens, {len(engine.pool.users)} pages of {PAGE_SIZE} slots")
    requests = [engine.submit(prompts()[0], max_new_tokens=5)]
    engine.step()  # the first is on its way when the others come
    requests += [engine.submit(prompt, max_new_tokens=5) for prompt in prompts()[1:]]
    started = time.perf_counter()
    steps = engine.run()
    print(f"{steps} more steps in {time.perf_counter() - started:.2f} s")

    replace_attention(model, dca_config)
    for request in requests:
        prompt = torch.tensor([request.tokens[: request.prompt_len]], device=model.device)
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
        same = "as model.generate" if alone[0].tolist() == request.tokens else "NOT as model.generate"
        shared = f", {request.shared} of them shared" if request.shared else ""
        print(f"{request.prompt_len} tokens{shared}: answer {bytes(request.answer).decode()!r}, {same}")


if __name__ == "__main__":
    main()
