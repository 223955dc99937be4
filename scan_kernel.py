"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2), written three times under one signature.

For every sequence b and channel d, with a state h of N numbers (A, B_t, C_t, a_t too have N, and B_t and C_t are the same
for all channels; u_t, dt_t, x_t, y_t are one number each; products are elementwise, <,> sums over the N):

    a_t = exp(dt_t A)                       how much of the state is kept          (the paper's A-bar)
    h_t = a_t h_{t-1} + B_t x_t             the recurrence, with x_t = dt_t u_t    (equation 2a; dt B: B-bar, for small dt)
    y_t = <C_t, h_t> + D u_t                what is read from the state            (equation 2b)
    out_t = y_t silu(z_t)                   the gate

u      (batch, dim, seqlen)      the input; x in the paper           A  (dim, dstate)         real; N is dstate
delta  (batch, dim, seqlen)      Delta; dt_t is Delta_t after        D  (dim,)                the skip connection
                                 delta_bias (dim,) and softplus      z  (batch, dim, seqlen)  the gating branch
B, C   (batch, dstate, seqlen)   how a token writes to the state and reads from it: "selective", as they vary with t

`selective_scan_ref` reads like the equations, `selective_scan_cpu` is PyTorch in cache-sized pieces, `selective_scan_triton`
GPU kernels; both are made by `make_scan`, of a forward and a backward pass by hand. `selective_scan` picks one, and `python
scan_kernel.py` times them. All walk through time step by step, for many sequences and channels at once.

The backward pass. Write dX for the gradient of the loss with respect to X, and g_t for dh_t. The gate gives
dy_t = dout_t silu(z_t) and dz_t = dout_t y_t silu'(z_t). h_t is used twice, by y_t and by h_{t+1}:

    g_t = C_t dy_t + a_{t+1} g_{t+1}        the recurrence again, run from right to left
    dC_t = sum_channels h_t dy_t            dB_t = sum_channels g_t x_t
    dx_t = <B_t, g_t>                       du_t = dt_t dx_t + D dy_t
    w_t = a_t g_t h_{t-1}                   the gradient of the exponent dt_t A
    dA = sum_{b,t} dt_t w_t                 ddt_t = <A, w_t> + u_t dx_t, times sigmoid (softplus' slope) for ddelta_t
    dD = sum_{b,t} u_t dy_t                 ddelta_bias = sum_{b,t} ddelta_t

It needs every h_t, which is N times the memory of u. So the forward pass keeps the states at the start of chunks of time
only, and the backward pass walks the chunks from right to left and computes their states anew.
"""
import math
import os

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS and Windows: selective_scan_cpu serves there
    triton = None


def check_arguments(u, delta, A, B, C, D, z, delta_bias):
    """Raises ValueError where an argument has a form that is not supported."""
    if u.dim() != 3 or 0 in u.shape[1:] or A.dim() != 2 or 0 in A.shape or A.is_complex():
        raise ValueError(f"u must be (batch, dim, seqlen), A real and (dim, dstate), none of them 0 but batch: got "
                         f"{tuple(u.shape)} and {A.dtype} {tuple(A.shape)}; complex A is not supported")
    (b, d, l), n = u.shape, A.shape[1]
    for name, x, shape in (("delta", delta, (b, d, l)), ("A", A, (d, n)), ("B", B, (b, n, l)), ("C", C, (b, n, l)),
                           ("D", D, (d,)), ("z", z, (b, d, l)), ("delta_bias", delta_bias, (d,))):
        if x is not None and (tuple(x.shape) != shape or x.device != u.device or not x.is_floating_point()):
            raise ValueError(f"{name} must be a real tensor {shape} on {u.device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
                             + "; constant and grouped B and C are not supported" * (name in "BC"))


def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """The equations above, one time step after the other. Arguments and results as in `selective_scan`."""
    check_arguments(u, delta, A, B, C, D, z, delta_bias)
    f = torch.promote_types(u.dtype, torch.float32)
    u_, dt, A, B, C = u.to(f), delta.to(f), A.to(f), B.to(f), C.to(f)
    dt = dt if delta_bias is None else dt + delta_bias.to(f)[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    a = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    Bx = torch.einsum("bdl,bnl->bdln", dt * u_, B)
    h, y = u_.new_zeros(u.shape[0], *A.shape), []                    # h (batch, dim, dstate)
    for a_t, Bx_t, C_t in zip(a.unbind(2), Bx.unbind(2), C.unbind(2)):
        h = a_t * h + Bx_t
        y.append(torch.einsum("bdn,bn->bd", h, C_t))
    y = torch.stack(y, dim=2)
    y = y if D is None else y + D.to(f)[:, None] * u_
    y = y if z is None else y * F.silu(z.to(f))
    return (y.to(u.dtype), h.detach()) if return_last_state else y.to(u.dtype)


TIME = 32        # time steps between two states that selective_scan_cpu saves
PIECE = 1 << 19  # elements of each of its temporaries per thread: few for the sake of the cache, but enough to keep calls rare


class Pieces:
    """The scan's inputs with channels last, (batch, time, dim) and (batch, time, dstate); and the pieces of batch and time
    in which they are worked through. A is (dstate, dim), so every product runs along dim, contiguous in memory."""
    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        batch, _, seqlen = u.shape
        self.dtype = torch.promote_types(u.dtype, torch.float32)
        self.A, self.D = A.to(self.dtype).t().contiguous(), u.new_zeros((), dtype=self.dtype) if D is None else D.to(self.dtype)
        self.u, self.raw, self.B, self.C, self.z = (None if x is None else x.to(self.dtype).mT.contiguous()
                                                    for x in (u, delta, B, C, z))
        self.raw = self.raw if delta_bias is None else self.raw + delta_bias.to(self.dtype)
        self.dt = F.softplus(self.raw) if delta_softplus else self.raw
        self.x = self.dt * self.u
        rows = max(1, min(batch, PIECE * torch.get_num_threads() // (min(seqlen, TIME) * A.numel())))
        self.memory = self.A.new_empty(3, rows * min(seqlen, TIME) * A.numel())
        self.all = [(k, slice(b, b + rows), slice(t, t + TIME)) for b in range(0, batch, rows)
                    for k, t in enumerate(range(0, seqlen, TIME))]

    def states(self, b, t, h0):
        """-> a_t, h_t of the piece [b, t] that starts from h0; room for g_t. Views (batch, time, dstate, dim) of `memory`."""
        shape = *self.dt[b, t].shape[:2], *self.A.shape
        a, h, g = (x[:math.prod(shape)].view(shape) for x in self.memory)
        torch.mul(self.dt[b, t, None, :], self.A, out=a).exp_()
        torch.mul(self.x[b, t, None, :], self.B[b, t, :, None], out=h)
        for a_t, h_t in zip(a.unbind(1), h.unbind(1)):               # h_t holds B_t x_t until here
            h0 = h_t.addcmul_(a_t, h0)
        return a, h, g


def like(x, y):
    """y (batch, time, dim) in the layout and dtype of x (batch, dim, time)"""
    return torch.empty_like(x).copy_(y.mT)


def cpu_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    """-> out like u; the last state (batch, dim, dstate); if `save`, the states before each chunk, as in `states_shape`."""
    p = Pieces(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    y, states = torch.empty_like(p.u), p.A.new_empty(states_shape(TIME, u, A, save))
    last = p.A.new_zeros(u.shape[0], *p.A.shape)
    for k, b, t in p.all:
        if save:
            states[k, b] = last[b]
        _, h, _ = p.states(b, t, last[b])
        last[b] = h[:, -1]
        y[b, t] = torch.einsum("btn,btnd->btd", p.C[b, t], h)
    y.addcmul_(p.D, p.u)
    if z is not None:
        y *= F.silu(p.z)
    return like(u, y), last.mT.contiguous(), states


def cpu_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus):
    """-> the gradients of u, delta, A, B, C, D, z, delta_bias, for arguments that are None too."""
    p = Pieces(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    dy = dout = dout.to(p.dtype).mT.contiguous()
    if z is not None:
        y, dy = torch.empty_like(dout), dout * F.silu(p.z)
    (ddt, dx, dB, dC), dA = map(torch.empty_like, (dy, dy, p.B, p.C)), torch.zeros_like(p.A)
    carry = p.A.new_zeros(u.shape[0], *p.A.shape)                    # a_{t+1} g_{t+1} of the chunk to the right
    for k, b, t in reversed(p.all):
        a, h, g = p.states(b, t, states[k, b])
        if z is not None:                                            # out = y silu(z), so y is needed once more
            y[b, t] = torch.einsum("btn,btnd->btd", p.C[b, t], h)
        dC[b, t] = torch.einsum("btd,btnd->btn", dy[b, t], h)       # in this order 2.5 times faster than as h, dy
        torch.mul(dy[b, t, None, :], p.C[b, t, :, None], out=g)
        a_, g_ = a.unbind(1), g.unbind(1)
        g_[-1].add_(carry[b])
        for i in range(len(g_) - 2, -1, -1):
            g_[i].addcmul_(a_[i + 1], g_[i + 1])
        dB[b, t] = torch.einsum("btd,btnd->btn", p.x[b, t], g)
        dx[b, t] = torch.einsum("btn,btnd->btd", p.B[b, t], g)
        w = a.mul_(g)                                                # a_t g_t
        carry[b] = w[:, 0]
        w[:, 1:].mul_(h[:, :-1])                                     # and now w_t = a_t g_t h_{t-1}
        w[:, 0].mul_(states[k, b])
        ddt[b, t] = torch.mul(w, p.A, out=g).sum(2)
        dA += torch.mul(w, p.dt[b, t, None, :], out=g).sum((0, 1))
    dz = u.new_empty(0) if z is None else like(z, torch.ops.aten.silu_backward(y.addcmul_(p.D, p.u).mul_(dout), p.z))
    ddt.addcmul_(p.u, dx)
    if delta_softplus:
        ddt = torch.ops.aten.softplus_backward(ddt, p.raw, 1, 20)
    dA, dB, dC = (x.mT.contiguous() for x in (dA, dB, dC))
    return like(u, dx.mul_(p.dt).addcmul_(p.D, dy)), like(delta, ddt), dA, dB, dC, (dy * p.u).sum((0, 1)), dz, ddt.sum((0, 1))


CHUNK, BLOCK_D = 8, 32  # steps whose states the backward kernel holds in registers; channels of a program: a warp's threads

if triton is not None:
    # One program works through one sequence for BLOCK_D channels, with their states in a tile (BLOCK_N, BLOCK_D). What is
    # (batch, dim, seqlen) comes as (pointer, its strides), so views need no copy; A, B, C come with their last dimensions
    # swapped. Offsets are 64-bit. `dim` is not specialized: did the compiler know it to be a multiple of 16, it would
    # spread the states of a channel over several threads, and every sum over states would need shuffles between them.
    LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

    @triton.jit
    def at(x, b, c, t):
        """Pointers to the elements (b, c, t) of x."""
        return x[0] + b * x[1] + c * x[2] + tl.cast(t, tl.int64) * x[3]

    @triton.jit
    def softplus(x):
        """log(1 + exp(x)), without overflow; log(s) e / (s - 1) makes up for what is rounded off in s."""
        e = tl.exp(-tl.abs(x))
        s = 1.0 + e
        return tl.maximum(x, 0.0) + tl.where(s == 1.0, e, tl.log(s) * (e / tl.where(s == 1.0, 1.0, s - 1.0)))

    @triton.jit
    def prepare(A, D, bias, dim, dstate, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
        """What a program works on. A comes times log2(e): the chip has 2^x, and makes e^x from it by one more product."""
        blocks = tl.cdiv(dim, BLOCK_D)
        block, b = (tl.program_id(0) % blocks).to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64)
        d, n = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N).to(tl.int64)
        in_d, in_n = d < dim, n < dstate
        nd, tile = n[:, None] * dim + d[None, :], in_n[:, None] & in_d[None, :]
        A_ = tl.load(A + nd, tile, 0.0) * LOG2_E
        D_ = tl.load(D + d, in_d, 0.0) if D is not None else tl.zeros((BLOCK_D,), A_.dtype)
        bias_ = tl.load(bias + d, in_d, 0.0) if bias is not None else tl.zeros((BLOCK_D,), A_.dtype)
        return block, b, d, n, nd, in_d, in_n, tile, A_, D_, bias_

    @triton.jit
    def discretize(u, delta, B, A, bias, b, d, n, t, seqlen, dstate, in_d, in_n, SOFTPLUS: tl.constexpr):
        """-> u_t, dt_t before and after the softplus (BLOCK_D); B_t (BLOCK_N); a_t (BLOCK_N, BLOCK_D)."""
        u_t = tl.load(at(u, b, d, t), in_d, 0.0).to(A.dtype)
        raw = tl.load(at(delta, b, d, t), in_d, 0.0).to(A.dtype) + bias
        dt = tl.where(in_d, softplus(raw) if SOFTPLUS else raw, 0.0)  # beyond the end, leave the state as it is
        return u_t, raw, dt, tl.load(B + (b * seqlen + t) * dstate + n, in_n, 0.0), tl.exp2(dt[None, :] * A)

    @triton.jit(do_not_specialize=["dim"])
    def forward_kernel(u, delta, z, out, A, B, C, D, bias, last, states, batch, dim, seqlen, dstate, SAVE: tl.constexpr,
                       SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
        block, b, d, n, nd, in_d, in_n, tile, A_, D_, bias_ = prepare(A, D, bias, dim, dstate, BLOCK_N, BLOCK_D)
        h = tl.zeros((BLOCK_N, BLOCK_D), A_.dtype)
        for t in range(seqlen):
            if SAVE and t % CHUNK == 0:                              # states (chunks, batch, dstate, dim)
                tl.store(states + (t // CHUNK * batch + b) * dstate * dim + nd, h, tile)
            u_t, raw, dt, B_t, a = discretize(u, delta, B, A_, bias_, b, d, n, t, seqlen, dstate, in_d, in_n, SOFTPLUS)
            h = a * h + B_t[:, None] * (dt * u_t)[None, :]
            y = tl.sum(tl.load(C + (b * seqlen + t) * dstate + n, in_n, 0.0)[:, None] * h, 0) + D_ * u_t
            if z is not None:
                z_t = tl.load(at(z, b, d, t), in_d, 0.0).to(A_.dtype)
                y *= z_t * tl.sigmoid(z_t)
            tl.store(at(out, b, d, t), y.to(out[0].dtype.element_ty), in_d)
        tl.store(last + b * dstate * dim + nd, h, tile)

    @triton.jit(do_not_specialize=["dim"])
    def backward_kernel(dout, u, delta, z, du, ddelta, dz, A, B, C, D, bias, states, dA, dB, dC, dD, dbias, batch, dim, seqlen,
                        dstate, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
        block, b, d, n, nd, in_d, in_n, tile, A_, D_, bias_ = prepare(A, D, bias, dim, dstate, BLOCK_N, BLOCK_D)
        dD_sum, dbias_sum = tl.zeros((BLOCK_D,), A_.dtype), tl.zeros((BLOCK_D,), A_.dtype)
        dA_sum, right = tl.zeros((BLOCK_N, BLOCK_D), A_.dtype), tl.zeros((BLOCK_N, BLOCK_D), A_.dtype)  # right: a_{t+1} g_{t+1}
        for j in range(tl.cdiv(seqlen, CHUNK)):
            k = tl.cdiv(seqlen, CHUNK) - 1 - j                       # the chunk: steps k CHUNK, k CHUNK + 1, ...
            h = tl.load(states + (k * batch + b) * dstate * dim + nd, tile, 0.0)
            hs = (h,)                                                # hs[i] is the state before step i of the chunk
            for i in tl.static_range(CHUNK):
                t = k * CHUNK + i
                u_t, raw, dt, B_t, a = discretize(u, delta, B, A_, bias_, b, d, n, t, seqlen, dstate, in_d & (t < seqlen),
                                                  in_n & (t < seqlen), SOFTPLUS)
                h = a * h + B_t[:, None] * (dt * u_t)[None, :]
                hs += (h,)
            for i in tl.static_range(CHUNK - 1, -1, -1):
                t = k * CHUNK + i
                in_dt, in_nt = in_d & (t < seqlen), in_n & (t < seqlen)
                u_t, raw, dt, B_t, a = discretize(u, delta, B, A_, bias_, b, d, n, t, seqlen, dstate, in_dt, in_nt, SOFTPLUS)
                C_t = tl.load(C + (b * seqlen + t) * dstate + n, in_nt, 0.0)
                dy = tl.load(at(dout, b, d, t), in_dt, 0.0).to(A_.dtype)    # beyond the end 0, and so is g
                if z is not None:                                    # out = y silu(z), so y is needed once more
                    z_t = tl.load(at(z, b, d, t), in_dt, 0.0).to(A_.dtype)
                    s = tl.sigmoid(z_t)
                    dz_t = dy * (tl.sum(C_t[:, None] * hs[i + 1], 0) + D_ * u_t) * s * (1.0 + z_t * (1.0 - s))
                    tl.store(at(dz, b, d, t), dz_t.to(dz[0].dtype.element_ty), in_dt)
                    dy *= z_t * s
                g = C_t[:, None] * dy[None, :] + right
                right = a * g
                w = right * hs[i]
                dx = tl.sum(B_t[:, None] * g, 0)
                ddt = tl.sum(A_ * w, 0) * LN_2 + u_t * dx            # LN_2, as A_ is A log2(e)
                if SOFTPLUS:
                    ddt *= tl.sigmoid(raw)
                tl.store(at(du, b, d, t), (dt * dx + D_ * dy).to(du[0].dtype.element_ty), in_dt)
                tl.store(at(ddelta, b, d, t), ddt.to(ddelta[0].dtype.element_ty), in_dt)
                dA_sum += dt[None, :] * w
                dD_sum += dy * u_t
                dbias_sum += ddt
                # a sum over channels or batch is made later, of the parts that the blocks and sequences leave here
                part = ((block * batch + b) * seqlen + t) * dstate + n
                tl.store(dB + part, tl.sum(g * (dt * u_t)[None, :], 1), in_nt)
                tl.store(dC + part, tl.sum(hs[i + 1] * dy[None, :], 1), in_nt)
        tl.store(dA + b * dstate * dim + nd, dA_sum, tile)
        tl.store(dD + b * dim + d, dD_sum, in_d)
        tl.store(dbias + b * dim + d, dbias_sum, in_d)


def launch(kernel, u, A, strided, others, buffers, **options):
    """Starts a program for each sequence and each block of channels."""
    if triton is None or not (u.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError("selective_scan_triton needs triton and a GPU, or TRITON_INTERPRET=1 set before Python starts")
    f = torch.promote_types(u.dtype, torch.float32)
    with torch.cuda.device_of(u):                                    # where Triton starts kernels
        kernel[(u.shape[0] * triton.cdiv(u.shape[1], BLOCK_D),)](
            *(None if x is None else (x, *x.stride()) for x in strided),
            *(None if x is None else (x.mT if x.dim() > 1 else x).to(f).contiguous() for x in others), *buffers, *u.shape,
            A.shape[1], CHUNK=CHUNK, BLOCK_N=triton.next_power_of_2(A.shape[1]), BLOCK_D=BLOCK_D,
            num_warps=BLOCK_D // 32, **options)


def triton_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    """As `cpu_forward`. Raises RuntimeError where Triton cannot run."""
    f, strided = torch.promote_types(u.dtype, torch.float32), (u, delta, z, out := torch.empty_like(u))
    last = u.new_empty(u.shape[0], A.shape[1], A.shape[0], dtype=f)
    states = u.new_empty(states_shape(CHUNK, u, A, save), dtype=f)
    launch(forward_kernel, u, A, strided, (A, B, C, D, delta_bias), (last, states), SAVE=save, SOFTPLUS=delta_softplus)
    return out, last.mT.contiguous(), states


def triton_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus):
    """As `cpu_backward`."""
    (batch, dim, seqlen), dstate, f = u.shape, A.shape[1], states.dtype
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), None if z is None else torch.empty_like(z)
    dA, (dD, dbias) = u.new_empty(batch, dstate, dim, dtype=f), u.new_empty(2, batch, dim, dtype=f)
    dB, dC = u.new_empty(2, triton.cdiv(dim, BLOCK_D), batch, seqlen, dstate, dtype=f)
    strided, buffers = (dout, u, delta, z, du, ddelta, dz), (states, dA, dB, dC, dD, dbias)
    launch(backward_kernel, u, A, strided, (A, B, C, D, delta_bias), buffers, SOFTPLUS=delta_softplus)
    dA, dB, dC = (x.sum(0).mT.contiguous() for x in (dA, dB, dC))
    return du, ddelta, dA, dB, dC, dD.sum(0), u.new_empty(0) if z is None else dz, dbias.sum(0)


def states_shape(chunk, u, A, save):
    """(chunks of time, batch, dstate, dim): of the state before each chunk, which the backward pass starts from."""
    return -(-u.shape[2] // chunk) if save else 0, u.shape[0], A.shape[1], u.shape[1]


def make_scan(name, forward, backward, chunk):
    """Makes a forward and a backward pass one differentiable function, which torch.compile takes as it is."""
    schema = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    op = torch.library.custom_op(f"pathstar::{name}", forward, mutates_args=(), schema=
                                 f"({schema} bool delta_softplus, bool save) -> ({', '.join(['Tensor'] * 3)})")
    op_backward = torch.library.custom_op(f"pathstar::{name}_backward", backward, mutates_args=(), schema=
                                          f"(Tensor dout, {schema} Tensor states, bool soft) -> ({', '.join(['Tensor'] * 8)})")

    @op.register_fake                              # shapes and dtypes without the work, for torch.compile
    def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
        return torch.empty_like(u), *(u.new_empty(shape, dtype=torch.promote_types(u.dtype, torch.float32)) for shape in (
            (u.shape[0], *A.shape), states_shape(chunk, u, A, save)))

    @op_backward.register_fake
    def _(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus):
        dA, dB, dC, dD, dbias = map(states.new_empty, (A.shape, B.shape, C.shape, A.shape[:1], A.shape[:1]))
        du, ddelta, dz = (u.new_empty(0) if x is None else torch.empty_like(x) for x in (u, delta, z))
        return du, ddelta, dA, dB, dC, dD, dz, dbias

    def save_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:8], output[2])
        ctx.delta_softplus = inputs[8]

    def differentiate(ctx, dout, dlast, dstates):
        *inputs, states = ctx.saved_tensors
        grads = op_backward(dout, *inputs, states, ctx.delta_softplus)
        return *(None if x is None else grad for x, grad in zip(inputs, grads)), None, None

    op.register_autograd(differentiate, setup_context=save_inputs)

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        inputs = u, delta, A, B, C, D, z, delta_bias
        check_arguments(*inputs)
        out, last, _ = op(*inputs, delta_softplus, torch.is_grad_enabled())
        return (out, last.detach()) if return_last_state else out
    return scan


selective_scan_cpu = make_scan("scan_cpu", cpu_forward, cpu_backward, TIME)
selective_scan_triton = make_scan("scan_triton", triton_forward, triton_backward, CHUNK)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """A drop-in for `selective_scan_fn` of the mamba_ssm package: real A, B and C that vary with time, shapes as on top.

    Any strides. D, z, delta_bias may be None. dt is delta + delta_bias, or the softplus of that. Returns out (batch, dim,
    seqlen) in u's dtype; with return_last_state also h after the last step (batch, dim, dstate), through which no gradient
    flows. States are float32, for float64 u float64. Raises ValueError for arguments of another form.
    """
    small = u.shape[2:] == (1,) or math.prod(u.shape[::2]) * A.numel() < 1000   # the fast paths cost more than they save
    scan = selective_scan_triton if u.is_cuda and triton is not None else selective_scan_ref if small else selective_scan_cpu
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def benchmark(device, shapes, dtypes, rivals):
    """Prints the median times of `selective_scan`, and as multiples those of rivals {name: function} for both passes."""
    def milliseconds(f):
        timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
        return triton.testing.do_bench(f, return_mode="median") if device == "cuda" else timer.blocked_autorange().median * 1e3

    if device == "cuda":
        memory, chip = torch.empty(1 << 30, device=device), triton.runtime.driver.active.utils.get_device_properties(0)
        copied = 8 * memory.numel() / milliseconds(memory.clone)                             # bytes in a millisecond
        exps = 16 * chip["multiprocessor_count"] * chip["sm_clock_rate"]                     # in a millisecond
    for (b, l, d, n), dtype in [(shape, dtype) for shape in shapes for dtype in dtypes]:
        sizes = (b, d, l), (b, d, l), (d, n), (b, n, l), (b, n, l), (d,), (b, d, l), (d,)
        inputs = [torch.randn(s, device=device, dtype=dtype if len(s) == 3 else None).requires_grad_() for s in sizes]
        inputs[2].data = -n * torch.rand_like(inputs[2])                                     # A
        out = selective_scan(*inputs, delta_softplus=True)
        times = (milliseconds(lambda: selective_scan(*inputs, delta_softplus=True)),
                 milliseconds(lambda: torch.autograd.grad(out, inputs, out, retain_graph=True)))
        line = f"{(b, l, d, n)!s:20} {str(dtype)[6:]:8} | forward {times[0]:.3f}, backward {times[1]:.3f}"
        for moved, e, time in ((4, n + 3, times[0]), (7, 2 * n + 6, times[1])) if device == "cuda" else ():  # counts per u_t
            line += f" | {out.nbytes * moved / copied / time:.0%} of copying, {out.numel() * e / exps / time:.0%} of exp"
        for name, rival in rivals.items():
            both = lambda: torch.autograd.grad((y := rival(*inputs, delta_softplus=True)), inputs, y, allow_unused=True)
            line += f" | {name} {milliseconds(both) / sum(times):.1f}x"
        print(line, flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; (batch, seqlen, dim, dstate), milliseconds")
    rivals, dtypes = {"loop": selective_scan_ref}, [torch.float32, torch.bfloat16]
    benchmark("cpu", [(1, 1, 16, 1), (1, 257, 40, 16), (128, 27, 128, 16), (256, 17, 256, 16)], dtypes[:1], rivals)
    if torch.cuda.is_available():
        benchmark("cuda", [(256, 31, 1568, 16), (8, 2048, 1536, 16), (8, 2048, 3072, 16)], dtypes, rivals)
