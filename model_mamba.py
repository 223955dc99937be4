"""A Mamba language model, version 1 (Gu & Dao 2023, arXiv 2312.00752).

Each layer mixes a token with the three before it (the convolution). Then a recurrence runs over the
tokens, the scan of scan_kernel.py. Every channel keeps d_state numbers, and each token selects how
much of them to forget, what to write and what to read.

    x -> in_proj -> u, z
    u -> conv1d -> silu -> u
    u -> x_proj -> dt_low, B, C     dt_low -> dt_proj -> delta
    scan(u, delta, A, B, C), times silu(z) -> out_proj -> added to x

On a list of edges `4,9|9,7|...` the convolution joins the two ends of an edge, because it hands
each token its left neighbour. So the token 7 of the edge `9,7` can write 9 into the state, in a
direction that depends on 7. A later token that knows 7 can read 9 there: it asks for the edge by
its head. All dummies `$` are the same token. The first convolution can tell apart only the first
three, which have `=` in their window. From the fourth on a model needs the state, or later passes;
how ours do it was not measured.

name          in the paper
L             sequence length. In shapes B is the batch; in the code B and C are the scan's
delta         Delta, how long a token acts: a large one overwrites the state, a small one keeps it.
              In the code the scan still adds a bias to it and takes the softplus
d_model       D, the width of the residual stream. In the code D is the scan's skip connection
d_inner       E D, the width inside a block (E = expand)
d_state       N, numbers of state per channel; dstate in scan_kernel.py
dt_low        the input of Delta's projection, of dt_rank numbers (R; "s_Delta", section 3.6)
d_conv        the width of the causal convolution before the scan (figure 3)

The stack of layers can be applied n_loop times with the same weights: a looped model (Dehghani et
al. 2018, arXiv 1807.03819; Saunshi et al. 2025, arXiv 2502.17416). Each time is called a pass. A
task of equal steps suits such a model, because it can use in every pass what the layers learned for
one step.

Parameters have the names and shapes of the state-spaces/mamba package, so its published
checkpoints load with `strict=True`. (They pad the vocabulary to a multiple of 8, as in the default
of `vocab_size`.) conv1d and dt_proj are used through their weights alone, so hooks on them are not
called. The weights with which training starts differ from the package's:
- The embedding, which is the output matrix too, begins with entries of size 1 / sqrt(d_model), not
  0.02, which would drown in what the first layer of a narrow model adds.
- What layer i adds to the residual stream is at first scaled by 1 / i, which leaves the first layer
  as it is. (The package scales by 1 / sqrt(n_layer) in all layers.)
- With A_init < 1 states fade more slowly at first, and recall is learned sooner (Trockman et al.
  2024, arXiv 2410.11135).
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
    n_loop: int = 1           # passes through the layers
    A_init: float = 1.0       # A starts at -A_init (1, ..., d_state)
    d_conv: int = 4
    expand: int = 2
    dt_rank: int = 0          # 0: d_model / 16, rounded up
    # softplus(Delta's bias) starts between these two. The slowest states fade to 1 / e in
    # 1 / (A_init Delta) steps.
    dt_min: float = 0.001
    dt_max: float = 0.1

    def __post_init__(self):
        if self.dt_rank == 0:
            self.dt_rank = math.ceil(self.d_model / 16)


class MambaBlock(nn.Module):
    """Algorithm 2, with the convolution and the gate of figure 3."""

    def __init__(self, config):
        super().__init__()
        d_inner = config.expand * config.d_model
        self.d_conv = config.d_conv
        self.dt_rank = config.dt_rank
        self.d_state = config.d_state
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, config.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, d_inner)
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)

        # A = -(1, 2, ..., N) for every channel, times A_init: each number of a state fades at its
        # own rate (S4D-real, section 3.6). The parameter is log(-A), so that A stays negative.
        A = -config.A_init * torch.arange(1.0, config.d_state + 1).repeat(d_inner, 1)
        self.A_log = nn.Parameter(torch.log(-A))
        self.D = nn.Parameter(torch.ones(d_inner))

        # softplus(bias) is log-uniform between dt_min and dt_max.
        bound = config.dt_rank ** -0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
        dt = torch.exp(torch.rand(d_inner) * (log_max - log_min) + log_min)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def forward(self, x, state=None):
        """x (B, L, d_model) -> the same shape, and the state after the last token

        The state is (conv_state, ssm_state): the last d_conv - 1 inputs of the convolution
        (B, d_conv - 1, d_inner), and the scan's state (B, d_inner, d_state). Given a state, x
        continues the tokens that led to it.
        """
        u, z = self.in_proj(x).chunk(2, dim=2)                          # (B, L, d_inner) each
        if state is None:
            conv_state = u.new_zeros(u.size(0), self.d_conv - 1, u.size(2))
            ssm_state = None
        else:
            conv_state, ssm_state = state
        u = torch.cat([conv_state, u], dim=1)
        conv_state = u[:, x.size(1):].clone()                           # a view would keep all of u
        u = F.silu(self.convolve(u))                                    # (B, L, d_inner)
        dt_low, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=2)
        delta = F.linear(dt_low, self.dt_proj.weight)                   # the scan adds the bias
        A = -torch.exp(self.A_log)
        u, delta, B, C, z = [each.mT for each in (u, delta, B, C, z)]   # time comes last now
        y, ssm_state = selective_scan(
            u, delta, A, B, C, self.D, z, self.dt_proj.bias,
            delta_softplus=True, return_last_state=True, initial_state=ssm_state
        )
        return self.out_proj(y.mT), (conv_state, ssm_state)

    def convolve(self, u):
        """Depthwise convolution over time: u (B, d_conv - 1 + L, d_inner) -> (B, L, d_inner)

        A sum of shifted products, since nn.Conv1d would transpose u and back, and take longer.
        """
        L = u.size(1) - self.d_conv + 1
        y = self.conv1d.bias
        for i in range(self.d_conv):
            y = y + self.conv1d.weight[:, 0, i] * u[:, i:i + L]
        return y


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mixer = MambaBlock(config)

    def forward(self, x, state=None):
        y, state = self.mixer(self.norm(x), state)
        return x + y, state


class Mamba(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        backbone = nn.ModuleDict(dict(
            embedding=nn.Embedding(config.vocab_size, config.d_model),
            layers=nn.ModuleList(Layer(config) for _ in range(config.n_layer)),
            norm_f=nn.RMSNorm(config.d_model, eps=1e-5),
        ))
        # The embedding is the output matrix, too. lm_head is its second name in published files. It
        # is registered first, so that loading ends with the embedding, the one that is used.
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = backbone.embedding.weight
        self.backbone = backbone
        nn.init.normal_(self.lm_head.weight, std=config.d_model ** -0.5)
        with torch.no_grad():
            for i, layer in enumerate(self.backbone.layers, start=1):
                layer.mixer.out_proj.weight.div_(i)

    def hidden_states(self, idx, states=None):
        """idx (B, L) -> the last layer's output, normed (B, L, d_model), and the states

        Each layer has one state for each pass. Given the states, idx continues the tokens that led
        to them.
        """
        layers = list(self.backbone.layers) * self.config.n_loop
        if states is None:
            states = [None] * len(layers)
        x = self.backbone.embedding(idx)
        new_states = []
        for layer, state in zip(layers, states):
            x, state = layer(x, state)
            new_states.append(state)
        return self.backbone.norm_f(x), new_states

    def logits(self, x):
        """x (B, L, d_model) -> (B, L, vocab_size)"""
        return F.linear(x, self.backbone.embedding.weight)

    def forward(self, idx, targets=None):
        """idx (B, L) int64 token ids -> logits (B, L, vocab_size), and the loss

        targets (B, L) has the token to predict at each position, or -1 where there is none. The
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
        """Continues idx (B, L) greedily, a token at a time -> (B, L + max_new_tokens)

        Raises ValueError if there is no token to continue.
        """
        if idx.size(1) == 0:
            raise ValueError("generate needs at least one token to continue")
        tokens = [idx]
        states = None
        for _ in range(max_new_tokens):
            x, states = self.hidden_states(tokens[-1], states)
            logits = self.logits(x[:, -1:])
            tokens.append(logits.argmax(dim=2))
        return torch.cat(tokens, dim=1)
