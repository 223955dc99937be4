"""A decoder-only Transformer: GPT-2's architecture (Radford et al. 2019), written out.

B  batch        T  tokens        C  n_embd, the width        vocab_size  number of tokens
S  keys         d  C / n_head, the width of a head

The stack of blocks can be applied n_loop times with the same weights: a looped model (Dehghani et
al. 2018, arXiv 1807.03819; Saunshi et al. 2025, arXiv 2502.17416). Each time is called a pass. A
task of equal steps suits such a model, because it can use in every pass what the blocks learned for
one step.

Parameters have the names and shapes of nanoGPT, so GPT-2's weights load with `strict=True` once its
Conv1D matrices are transposed. (A file without lm_head.weight, as `save_pretrained` writes it,
needs a copy of transformer.wte.weight under that name.) There is no dropout. The GELU is exact, as
in nanoGPT. GPT-2 approximates it by a tanh, which is slow on a CPU; with `approximate="tanh"` the
MLP computes GPT-2's. The weights with which training starts differ from GPT-2's in three ways:
- The table of positions begins as sinusoids, not as noise, and larger than the other weights, so
  that attention to "the token one to the left" is easy to express.
- The matrices begin larger in a narrow model. At GPT-2's width they begin as GPT-2's do.
- What block i adds to the residual stream is at first scaled by 1 / i, which leaves the first block
  as it is. (GPT-2 scales by 1 / sqrt(2 n_layer) in all blocks.)
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
    n_loop: int = 1           # passes through the blocks

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}"
            )


def attention(q, k, v):
    """softmax(Q K^T / sqrt(d)) V, causal (Vaswani et al. 2017, equation 1).

    q (B, n_head, T, d); k, v (B, n_head, S, d) with S >= T. The queries stand at the last T of the
    S positions. Each sees the keys up to its own position.
    """
    T, S = q.size(2), k.size(2)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.mT / math.sqrt(q.size(3))                        # (B, n_head, T, S)
    scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(dim=3) @ v                                # (B, n_head, T, d)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)   # queries, keys, values
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x, cache=None):
        """x (B, T, C) -> the same shape, and the cache: keys and values (B, n_head, S, d) so far

        Given a cache, x continues the tokens that led to it.
        """
        B, T, C = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(heads).transpose(1, 2)                           # (B, n_head, T, d)
        k = k.view(heads).transpose(1, 2)
        v = v.view(heads).transpose(1, 2)
        if cache is not None:
            k = torch.cat([cache[0], k], dim=2)
            v = torch.cat([cache[1], v], dim=2)
        y = attention(q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)                      # heads side by side
        return self.c_proj(y), (k, v)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x))
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        y, cache = self.attn(self.ln_1(x), cache)
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x, cache


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        # The embedding is the output matrix, too. lm_head is its second name in GPT-2's files. It
        # is registered first, so that loading ends with the embedding, the one that is used.
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = transformer.wte.weight
        self.transformer = transformer
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        # A narrow layer sums over few inputs, so it needs larger weights for an output as large.
        std = 0.02 * math.sqrt(768 / self.config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        positions = sinusoids(self.config.block_size, self.config.n_embd)
        self.transformer.wpe.weight.copy_(4 * std * positions)
        for i, block in enumerate(self.transformer.h, start=1):
            block.attn.c_proj.weight.div_(i)
            block.mlp.c_proj.weight.div_(i)

    def hidden_states(self, idx, caches=None):
        """idx (B, T) -> the last block's output, normed (B, T, C), and the caches

        Each block has one cache for each pass. Given the caches, idx continues the tokens that led
        to them. Raises ValueError if the sequence is longer than block_size.
        """
        blocks = list(self.transformer.h) * self.config.n_loop
        seen = 0
        if caches is None:
            caches = [None] * len(blocks)
        else:
            seen = caches[0][0].size(2)
        length = seen + idx.size(1)
        if length > self.config.block_size:
            raise ValueError(
                f"a sequence of {length} tokens is longer than block_size {self.config.block_size}"
            )
        positions = torch.arange(seen, length, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)     # (B, T, C)
        new_caches = []
        for block, cache in zip(blocks, caches):
            x, cache = block(x, cache)
            new_caches.append(cache)
        return self.transformer.ln_f(x), new_caches

    def logits(self, x):
        """x (B, T, C) -> (B, T, vocab_size)"""
        return F.linear(x, self.transformer.wte.weight)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 token ids -> logits (B, T, vocab_size), and the loss

        targets (B, T) has the token to predict at each position, or -1 where there is none. The
        loss is the mean cross-entropy in nats; without targets it is None.
        """
        x, _ = self.hidden_states(idx)
        logits = self.logits(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        """Continues idx (B, T) greedily, a token at a time -> (B, T + max_new_tokens)

        Raises ValueError if there is no token to continue.
        """
        if idx.size(1) == 0:
            raise ValueError("generate needs at least one token to continue")
        tokens = [idx]
        caches = None
        for _ in range(max_new_tokens):
            x, caches = self.hidden_states(tokens[-1], caches)
            logits = self.logits(x[:, -1:])
            tokens.append(logits.argmax(dim=2))
        return torch.cat(tokens, dim=1)


def sinusoids(length, width):
    """-> (length, width): sines and cosines of the position (Vaswani et al. 2017, section 3.5)

    The wavelengths go from 4 tokens to nearly 4 times the length, so that the longest makes about a
    quarter of a turn over the table.
    """
    frequency = length ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(length)[:, None] * math.pi / 2 * frequency  # (length, width / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :width]
