"""Reads a Llama-architecture GGUF file into an ordinary transformers config, state dict and tokenizer.

transformers can open GGUF files too, and `models.load_model` lets it for the other architectures. For Llama we read
the file ourselves because transformers needs the ``accelerate`` package for it, parses the file four times (28 s
against 7 s for SmolLM2-135M), returns a model that ``save_pretrained`` refuses, ignores ``rope_freqs.weight``, and
does not split numbers into digits where the file's vocabulary was trained that way (transformers 5.17 to 5.23).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Names of a GGUF file's tensors, of the whole model and of one block, in transformers' terms.
_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

#: Metadata under ``llama.`` that changes what the model computes and that is not carried over.
_UNREAD_KEYS = ("expert_count", "rope.scaling.type", "rope.scale_linear", "attention.sliding_window")

#: ``tokenizer.ggml.pre`` -> whether numbers are cut into single digits before the GPT-2 pattern is applied.
_GPT2_PATTERNS = {"smollm": True, "default": False, "gpt-2": False}

TensorProgress = Callable[[int, int], None]


class UnsupportedGGUF(ValueError):
    """The file is a GGUF file that this reader does not understand in full; the message says what is in the way."""


class LlamaGGUF:
    """A GGUF file, opened once: its metadata is parsed by the constructor, its tensors when asked for."""

    def __init__(self, path: str | Path) -> None:
        """Opens ``path``.

        Raises:
            UnsupportedGGUF: for another architecture, or one whose metadata asks for more than plain Llama (experts,
                scaled rotary frequencies, sliding windows).
            ValueError, OSError: from ``gguf`` for a file that is damaged or not GGUF.
        """
        from gguf import GGUFReader

        self.path = Path(path)
        self._reader = GGUFReader(str(path))
        architecture = self.metadata("general.architecture")
        if architecture != "llama":
            raise UnsupportedGGUF(f"{self.path.name} holds the architecture {architecture!r}, not 'llama'")
        for key in _UNREAD_KEYS:
            if self._llama(key) not in (None, 0, "none"):
                raise UnsupportedGGUF(f"{self.path.name} sets llama.{key}, which this reader does not know")
        if self._llama("rope.dimension_count", self._head_dim()) != self._head_dim():
            raise UnsupportedGGUF(f"{self.path.name} rotates only a part of each head")
        if any(t.name == "rope_freqs.weight" for t in self._reader.tensors):
            raise UnsupportedGGUF(f"{self.path.name} scales its rotary frequencies by rope_freqs.weight")

    def metadata(self, key: str, default: Any = None) -> Any:
        """The value of one metadata key: a number, string, bool or list."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _llama(self, key: str, default: Any = None) -> Any:
        return self.metadata(f"llama.{key}", default)

    def _head_dim(self) -> int:
        return self._llama("attention.key_length") or (
            self._llama("embedding_length") // self._llama("attention.head_count")
        )

    def config(self) -> Any:
        """The `LlamaConfig` that the metadata describes."""
        from transformers import LlamaConfig

        num_heads = self._llama("attention.head_count")
        config = LlamaConfig(
            vocab_size=self._llama("vocab_size") or len(self.metadata("tokenizer.ggml.tokens")),
            hidden_size=self._llama("embedding_length"),
            intermediate_size=self._llama("feed_forward_length"),
            num_hidden_layers=self._llama("block_count"),
            num_attention_heads=num_heads,
            num_key_value_heads=self._llama("attention.head_count_kv", num_heads),
            head_dim=self._head_dim(),
            max_position_embeddings=self._llama("context_length"),
            rms_norm_eps=self._llama("attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": self._llama("rope.freq_base", 10000.0)},
            tie_word_embeddings=all(t.name != "output.weight" for t in self._reader.tensors),
            attention_bias=any(t.name.endswith("attn_q.bias") for t in self._reader.tensors),
            bos_token_id=self.metadata("tokenizer.ggml.bos_token_id"),
            eos_token_id=self.metadata("tokenizer.ggml.eos_token_id"),
            pad_token_id=self.metadata("tokenizer.ggml.padding_token_id"),
        )
        config.architectures = ["LlamaForCausalLM"]
        return config

    def state_dict(self, progress: TensorProgress | None = None) -> dict[str, Tensor]:
        """All weights, dequantised to float32, under transformers' names; ``progress(done, total)`` per tensor.

        Raises:
            UnsupportedGGUF: for a tensor that plain Llama does not have.
        """
        from gguf import dequantize

        heads = {
            "attn_q": self._llama("attention.head_count"),
            "attn_k": self._llama("attention.head_count_kv", self._llama("attention.head_count")),
        }
        weights = {}
        for done, tensor in enumerate(self._reader.tensors, start=1):
            # The copy detaches the weights from the mapped file, and makes them writable as torch wants them.
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=True))
            kind = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
            if kind in heads:
                weight = _halves_from_pairs(weight, heads[kind])
            weights[self._transformers_name(tensor.name)] = weight
            if progress is not None:
                progress(done, len(self._reader.tensors))
        return weights

    def _transformers_name(self, name: str) -> str:
        if name in _MODEL_NAMES:
            return _MODEL_NAMES[name]
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in _BLOCK_NAMES:
            return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.{parts[3]}"
        raise UnsupportedGGUF(f"{self.path.name} holds the tensor {name}, which a Llama model does not have")

    def tokenizer(self) -> Any:
        """The tokenizer, with its special tokens and chat template, as a transformers fast tokenizer.

        Vocabularies other than byte-level BPE with GPT-2's splitting pattern are left to transformers.
        """
        digits = _GPT2_PATTERNS.get(self.metadata("tokenizer.ggml.pre", "default"))
        if self.metadata("tokenizer.ggml.model") != "gpt2" or digits is None:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        return self._byte_level_tokenizer(individual_digits=digits)

    def _byte_level_tokenizer(self, individual_digits: bool) -> Any:
        from gguf import TokenType
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        tokens = self.metadata("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self.metadata("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if individual_digits else byte_level
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self.metadata("tokenizer.ggml.token_type", [])
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, kinds, strict=False)
                if kind == TokenType.CONTROL
            ]
        )
        keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        special = {name: self.metadata(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=self.metadata("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **{f"{name}_token": tokens[i] for name, i in special.items() if i is not None},
        )


def _halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection (num_heads * head_dim, ...) from GGUF's order, in which rotary channels (2c,
    2c + 1) turn together, to transformers' order, in which (c, c + head_dim / 2) do."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()
