"""A decoder-only Transformer: GPT-2's architecture (Radford et al. 2019), written out.

B  batch        T  tokens       C  n_embd, the width        vocab_size  tokens there are

Parameters are named and shaped as in nanoGPT, so GPT-2's weights load with `strict=True` once its Conv1D matrices are
transposed. There is no dropout, and three things differ from GPT-2 at the start of training only. The table of positions
begins as sinusoids rather than as noise, because attention to "the token one to the left" is then easy to express; every
step of following a path is such a look. The matrices of a model narrower than GPT-2 begin larger. And what block i adds to
the residual stream is scaled by 1 / i (GPT-2: by 1 / sqrt(2 n_layer), all alike), which also bounds its variance, but has
the lower blocks learn first: a circuit that forms high in the stack leaves no blocks for the steps that are to follow it.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int = 1024    # the longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    fused: bool = True        # attention by PyTorch's fused kernel; False: written out, the same numbers

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")


def attention(q, k, v):
    """softmax(Q K^T / sqrt(d)) V, where each query sees the keys up to its own position (Vaswani et al. 2017, eq. 1).

    q (B, n_head, T, d); k, v (B, n_head, S, d) with S >= T: the queries are the last T of the S positions.
    """
    T, S = q.size(2), k.size(2)
    future = torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device).triu(S - T + 1)
    scores = (q / math.sqrt(q.size(3))) @ k.transpose(2, 3) + future                # (B, n_head, T, S)
    return scores.softmax(dim=3) @ v                                                # (B, n_head, T, d)


def fused_attention(q, k, v):
    """The same in one kernel that never stores the (T, S) scores. It knows two cases: all positions, or one at a time."""
    T, S = q.size(2), k.size(2)
    if 1 < T < S:
        return attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)                   # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.attend = fused_attention if config.fused else attention

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)      # (B, n_head, T, d)
                   for y in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            if cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache["k"], cache["v"] = k, v
        y = self.attend(q, k, v).transpose(1, 2).reshape(B, T, C)                   # heads side by side
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))                # the tanh form is GPT-2's


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight                           # tied
        std = 0.02 * math.sqrt(768 / config.n_embd)    # GPT-2's 0.02; narrower needs larger numbers to pass on as much
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        with torch.no_grad():
            self.transformer.wpe.weight.copy_(2 * std * sinusoids(config.block_size, config.n_embd))
            for i, block in enumerate(self.transformer.h):      # what each block adds to the residual stream, less and less
                block.attn.c_proj.weight.div_(i + 1)
                block.mlp.c_proj.weight.div_(i + 1)

    def new_cache(self):
        """An empty cache: what `forward` will keep of the tokens it has seen (keys and values), one dict a layer."""
        return [{} for _ in self.transformer.h]

    def forward(self, idx, targets=None, cache=None, all_logits=False):
        """idx (B, T) int64 token ids; targets (B, T), the token to predict at each position, -1 where none is.

        -> logits (B, T, vocab_size) and the mean cross-entropy in nats; without targets the loss is None and the logits
        are those of the last position, (B, 1, vocab_size), unless all_logits is set. With a cache, idx continues the
        tokens that the cache has seen. Raises ValueError if the sequence is longer than block_size.
        """
        seen = cache[0]["k"].size(2) if cache and cache[0] else 0
        T = idx.size(1)
        if seen + T > self.config.block_size:
            raise ValueError(f"a sequence of {seen + T} tokens is longer than block_size = {self.config.block_size}")
        position = torch.arange(seen, seen + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)              # (B, T, C)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache[i] if cache is not None else None)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x if all_logits else x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, cache=None):
        """Continues idx (B, T), and what the cache has seen before it, greedily -> (B, T + max_new_tokens)."""
        cache, tokens = self.new_cache() if cache is None else cache, [idx]
        for _ in range(max_new_tokens):
            logits, _ = self(tokens[-1], cache=cache)
            tokens.append(logits[:, -1].argmax(dim=-1, keepdim=True))
        return torch.cat(tokens, dim=1)


def sinusoids(length, width):
    """(length, width): sines and cosines of the position (Vaswani et al. 2017, section 3.5).

    At wavelengths from 4 tokens to 4 times the length, the distances that matter in a table of this length.
    """
    angle = torch.arange(length)[:, None] * math.pi / 2 * length ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :width]
