"""A Mamba language model, version 1 (Gu & Dao 2023, arXiv 2312.00752), around the scan of scan_kernel.py.

Each layer mixes a token with the three before it (the convolution), then runs a recurrence: every channel keeps d_state
numbers, and each token decides ("selective") how much of them to forget, what to write, and what to read.

    x -> in_proj -> u, z        u -> conv1d -> silu -> u        u -> x_proj, dt_proj -> delta, B, C
                                scan(u, delta, A, B, C) times silu(z) -> out_proj -> added to x

name          in the paper
B, L          batch and sequence length, in the shapes; in the code B and C are the scan's
delta         Delta, how long a token acts: a large one overwrites the state, a small one leaves it as it is
d_model       D, the width of the residual stream
d_inner       E D, the width inside a block (E = expand)
d_state       N, numbers of state per channel
dt_rank       R, the rank of the projection that makes Delta ("s_Delta", section 3.6)
d_conv        the width of the causal convolution before the scan (figure 3)

Parameters are named and shaped as in the state-spaces/mamba package, so its published checkpoints load with
`strict=True`. (They pad the vocabulary to a multiple of 8; here vocab_size is what you say, so say 50280 for those.)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from scan_kernel import selective_scan


@dataclass
class MambaConfig:
    vocab_size: int = 50280
    n_layer: int = 24
    d_model: int = 768
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0          # 0: d_model / 16, rounded up
    dt_min: float = 0.001     # Delta starts log-uniform between these two: states last up to 1 / Delta = 10 to 1000 steps
    dt_max: float = 0.1

    def __post_init__(self):
        self.dt_rank = self.dt_rank or math.ceil(self.d_model / 16)


class MambaBlock(nn.Module):
    """Algorithm 2 with the convolution and gate of figure 3."""

    def __init__(self, config):
        super().__init__()
        d_inner, d_state, dt_rank = config.expand * config.d_model, config.d_state, config.dt_rank
        self.sizes = dt_rank, d_state, d_state
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)

        # A = -(1, 2, ..., N) for every channel: S4D-real (section 3.6), each number of a state fades at its own rate. Kept
        # as a logarithm, so that A stays negative, and exp(delta A), what is kept of the state, below 1
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.A_log._no_weight_decay = self.D._no_weight_decay = True

        nn.init.uniform_(self.dt_proj.weight, -dt_rank ** -0.5, dt_rank ** -0.5)
        dt = torch.exp(torch.rand(d_inner) * math.log(config.dt_max / config.dt_min) + math.log(config.dt_min))
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))              # softplus of this is dt
            # each block adds to the residual stream once; the scale keeps its variance from growing with depth
            self.out_proj.weight.div_(math.sqrt(config.n_layer))

    def forward(self, x, cache=None):
        """x (B, L, d_model) -> the same shape. A cache, {} at first, keeps the convolution's last inputs and the state."""
        if cache and x.size(1) > 1:        # an empty cache is filled by the whole scan, a filled one continued step by step
            return torch.cat([self(x_t, cache) for x_t in x.split(1, dim=1)], dim=1)
        u, z = self.in_proj(x).chunk(2, dim=2)                                      # (B, L, d_inner) each
        u, conv_state = self.convolve(u, cache["conv"] if cache else None)
        u = F.silu(u)
        low, B, C = self.x_proj(u).split(self.sizes, dim=2)                         # (B, L, dt_rank), (B, L, d_state) x 2
        delta = F.linear(low, self.dt_proj.weight)                                  # its bias is added in the scan
        u, delta, B, C, z = (y.transpose(1, 2) for y in (u, delta, B, C, z))        # time comes last in the scan
        A = -torch.exp(self.A_log)
        if cache:
            y, state = step(u, delta, A, B, C, self.D, z, self.dt_proj.bias, cache["ssm"])
        else:
            y, state = selective_scan(u, delta, A, B, C, self.D, z, self.dt_proj.bias, delta_softplus=True,
                                      return_last_state=True)
        if cache is not None:
            cache["conv"], cache["ssm"] = conv_state, state
        return self.out_proj(y.transpose(1, 2))

    def convolve(self, u, before=None):
        """Causal depthwise convolution of u (B, L, d_inner), where `before` stood to the left of it (zeros at the start).

        -> the same shape, and the last d_conv - 1 inputs, (B, d_conv - 1, d_inner), for the call that continues.
        """
        width, L = self.conv1d.kernel_size[0], u.size(1)
        u = F.pad(u, (0, 0, width - 1, 0)) if before is None else torch.cat([before, u], dim=1)
        # as an image of height 1 with channels last, the layout that u has: conv1d would transpose it and back
        y = F.conv2d(u.transpose(1, 2)[:, :, None], self.conv1d.weight[:, :, None], self.conv1d.bias, groups=u.size(2))
        return y[:, :, 0].transpose(1, 2), u[:, L:]


def step(u, delta, A, B, C, D, z, delta_bias, h):
    """One step of the scan, from state h (B, d_inner, d_state); the rest as in `selective_scan`, with L = 1."""
    u_, dt, B, C, z = (x.squeeze(2).to(h.dtype) for x in (u, delta, B, C, z))
    dt = F.softplus(dt + delta_bias)
    h = torch.exp(dt[:, :, None] * A) * h + (dt * u_)[:, :, None] * B[:, None, :]
    y = ((h * C[:, None, :]).sum(2) + D * u_) * F.silu(z)
    return y[:, :, None].to(u.dtype), h


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mixer = MambaBlock(config)

    def forward(self, x, cache=None):
        return x + self.mixer(self.norm(x), cache)


class Mamba(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = nn.ModuleDict(dict(
            embedding=nn.Embedding(config.vocab_size, config.d_model),
            layers=nn.ModuleList(Layer(config) for _ in range(config.n_layer)),
            norm_f=nn.RMSNorm(config.d_model, eps=1e-5)))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight                        # tied
        # logits of size 1. The package's 0.02 is for large widths: in a narrow model what the first layer adds drowns it
        nn.init.normal_(self.lm_head.weight, std=config.d_model ** -0.5)

    def new_cache(self):
        """An empty cache: what `forward` will keep of the tokens it has seen (two states), one dict a layer."""
        return [{} for _ in self.backbone.layers]

    def forward(self, idx, targets=None, cache=None, all_logits=False):
        """idx (B, L) int64 token ids; targets (B, L), the token to predict at each position, -1 where none is.

        -> logits (B, L, vocab_size) and the mean cross-entropy in nats; without targets the loss is None and the logits
        are those of the last position, (B, 1, vocab_size), unless all_logits is set. With a cache, idx continues the
        tokens that the cache has seen.
        """
        x = self.backbone.embedding(idx)                                            # (B, L, d_model)
        for i, layer in enumerate(self.backbone.layers):
            x = layer(x, cache[i] if cache is not None else None)
        x = self.backbone.norm_f(x)
        if targets is None:
            return self.lm_head(x if all_logits else x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, cache=None):
        """Continues idx (B, L), and what the cache has seen before it, greedily -> (B, L + max_new_tokens)."""
        cache, tokens = self.new_cache() if cache is None else cache, [idx]
        for _ in range(max_new_tokens):
            logits, _ = self(tokens[-1], cache=cache)
            tokens.append(logits[:, -1].argmax(dim=-1, keepdim=True))
        return torch.cat(tokens, dim=1)
