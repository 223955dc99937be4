"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Algorithm 2), written three times under one signature.

For every sequence b and channel d, with a state h of N numbers:

    a_t = exp(dt_t A)                       how much of the state is kept          (paper: A-bar)
    h_t = a_t h_{t-1} + B_t dt_t u_t        the recurrence                         (paper: equation 2a)
    y_t = <C_t, h_t> + D u_t                what is read from the state            (paper: equation 2b)
    out_t = y_t silu(z_t)                   the gate

name here     shape                    in the paper
u             (batch, dim, seqlen)     x, the input of the scan
delta         (batch, dim, seqlen)     Delta before its bias and softplus; dt is Delta after them
A             (dim, dstate)            A, real and diagonal, so one row of N numbers per channel
B, C          (batch, dstate, seqlen)  B_t and C_t: they depend on the token, hence "selective"
D             (dim,)                   the skip connection
z             (batch, dim, seqlen)     the gating branch

- `selective_scan_ref`     reads like the equations; autograd differentiates it (slow, remembers every state).
- `selective_scan_cpu`     PyTorch in cache-sized pieces, with the backward pass below written by hand.
- `selective_scan_triton`  the same two passes as GPU kernels (on a CPU under TRITON_INTERPRET=1, to test them).
- `selective_scan`         picks one of the last two by the tensor's device.

The backward pass. Call g_t the gradient of the loss with respect to h_t. h_t is used twice, by y_t and by h_{t+1}:

    g_t = C_t dy_t + a_{t+1} g_{t+1}        the recurrence again, run from right to left
    dC_t = sum_d h_t dy_t                   dB_t = sum_d g_t (dt_t u_t)
    dx_t = <B_t, g_t>                       the gradient of x_t = dt_t u_t
    w_t = g_t a_t h_{t-1}                   the gradient of the exponent dt_t A
    dA = sum_{b,t} dt_t w_t                 ddt_t = <A, w_t> + u_t dx_t            du_t = dt_t dx_t + D dy_t

It needs every h_t. Storing them would take N times the memory of u, so the forward pass keeps the state at the start of
each chunk of time only, and the backward pass walks the chunks from right to left and computes their states anew.

    python scan_kernel.py        checks the implementations against each other and times them on this machine
"""
import math
import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on macOS and Windows: selective_scan_cpu serves there
    triton = None


def check_arguments(u, delta, A, B, C, D, z, delta_bias):
    """Raises ValueError where an argument is of a form that is not supported, or of the wrong shape."""
    if u.dim() != 3:
        raise ValueError(f"u must be (batch, dim, seqlen), got {tuple(u.shape)}")
    batch, dim, seqlen = u.shape
    if A.dim() != 2 or A.is_complex():
        raise ValueError(f"A must be real and (dim, dstate), got {A.dtype} {tuple(A.shape)}: complex A is not supported")
    expected = {"delta": (batch, dim, seqlen), "A": (dim, A.shape[1]), "B": (batch, A.shape[1], seqlen),
                "C": (batch, A.shape[1], seqlen), "D": (dim,), "z": (batch, dim, seqlen), "delta_bias": (dim,)}
    given = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    for name, x in given.items():
        if x is not None and tuple(x.shape) != expected[name]:
            hint = ": constant and grouped B, C are not supported" if name in "BC" else ""
            raise ValueError(f"{name} must have shape {expected[name]}, got {tuple(x.shape)}{hint}")
        if x is not None and (x.device != u.device or not x.is_floating_point()):
            raise ValueError(f"{name} must be a real tensor on {u.device} as u is, got {x.dtype} on {x.device}")


def state_dtype(u):
    return torch.float64 if u.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------- the plain loop

def selective_scan_ref(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                       return_last_state=False):
    """The equations above, one time step after the other. Arguments and results as in `selective_scan`."""
    check_arguments(u, delta, A, B, C, D, z, delta_bias)
    f = state_dtype(u)
    x, dt, A, B, C = u.to(f), delta.to(f), A.to(f), B.to(f), C.to(f)
    if delta_bias is not None:
        dt = dt + delta_bias.to(f)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    a = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    Bx = torch.einsum("bdl,bnl->bdln", dt * x, B)
    h, y = x.new_zeros(u.shape[0], *A.shape), torch.zeros_like(x)
    for t in range(u.shape[2]):
        h = a[:, :, t] * h + Bx[:, :, t]
        y[:, :, t] = torch.einsum("bdn,bn->bd", h, C[:, :, t])
    if D is not None:
        y = y + D.to(f)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(f))
    return (y.to(u.dtype), h.detach()) if return_last_state else y.to(u.dtype)


# ---------------------------------------------------------------------------------------------- CPU, in PyTorch

TIME = 64        # time steps in a piece, and between two saved states
PIECE = 1 << 19  # elements of a (batch, time, dstate, dim) temporary per thread: 2 MB in float32. Smaller ones fit the
                 # cache better, larger ones spend less on calls: measured, 2^19 is best for one thread and for two


class Pieces:
    """The scan's inputs with channels last, and the pieces of batch and time in which they are worked through.

    dim stands last, so that each product below runs over contiguous memory with one operand broadcast: (batch, time, dim),
    B and C (batch, time, dstate), A (dstate, dim).
    """

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        f = self.dtype = state_dtype(u)
        (batch, dim, seqlen), dstate = u.shape, A.shape[1]
        self.A, self.D = A.to(f).t().contiguous(), None if D is None else D.to(f)
        self.u, self.B, self.C, self.z = map(self.channels_last, (u, B, C, z))
        self.raw = self.channels_last(delta) if delta_bias is None else self.channels_last(delta) + delta_bias.to(f)
        self.dt = F.softplus(self.raw) if delta_softplus else self.raw
        self.x = self.dt * self.u
        time = min(seqlen, TIME)
        rows = max(1, min(batch, PIECE * torch.get_num_threads() // max(1, time * dim * dstate)))
        self.size = rows * time * dim * dstate
        self.all = [(k, slice(b, b + rows), slice(t, t + time)) for b in range(0, batch, rows)
                    for k, t in enumerate(range(0, seqlen, TIME))]

    def channels_last(self, x):
        """(batch, channels, time) -> (batch, time, channels)"""
        return None if x is None else x.to(self.dtype).transpose(1, 2).contiguous()

    def states(self, b, t, h0, a, h):
        """Fills the buffers with a_t and h_t (batch, time, dstate, dim) for one piece that starts from state h0."""
        dt, x = self.dt[b, t], self.x[b, t]
        shape = *dt.shape[:2], *self.A.shape
        a, h = (buffer[:math.prod(shape)].view(shape) for buffer in (a, h))
        torch.mul(dt[:, :, None, :], self.A, out=a).exp_()
        torch.mul(x[:, :, None, :], self.B[b, t][:, :, :, None], out=h)
        for a_t, h_t in zip(a.unbind(1), h.unbind(1)):
            h0 = h_t.addcmul_(a_t, h0)
        return a, h


def over_states(c, h):
    """sum_n c_n h_nd: (batch, time, dstate), (batch, time, dstate, dim) -> (batch, time, dim)"""
    return torch.matmul(c[:, :, None, :], h).squeeze(2)


def over_channels(h, x):
    """sum_d h_nd x_d: (batch, time, dstate, dim), (batch, time, dim) -> (batch, time, dstate)"""
    return torch.matmul(h, x[:, :, :, None]).squeeze(3)


def cpu_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    """-> out like u; the last state (batch, dim, dstate); and if `save`, the state before each chunk of time
    (chunks, batch, dstate, dim), else nothing there."""
    p = Pieces(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    y, last = torch.empty_like(p.u), p.A.new_zeros(u.shape[0], *p.A.shape)
    states = p.A.new_empty(states_shape(TIME, u, A, save))
    a, h = p.A.new_empty(2, p.size)
    for k, b, t in p.all:
        if save:
            states[k, b] = last[b]
        h_ = p.states(b, t, last[b], a, h)[1]
        last[b] = h_[:, -1]
        y[b, t] = over_states(p.C[b, t], h_)
    if D is not None:
        y.addcmul_(p.u, p.D)
    if z is not None:
        y.mul_(F.silu(p.z))
    return torch.empty_like(u).copy_(y.transpose(1, 2)), last.transpose(1, 2).contiguous(), states


def cpu_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus):
    """-> the gradients of u, delta, A, B, C, D, z, delta_bias, for arguments that are None too."""
    p = Pieces(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    dy = dout = p.channels_last(dout)
    if z is not None:
        y, s = torch.empty_like(dy), torch.sigmoid(p.z)
        dy = dout * p.z * s
    dB, dC, dA = torch.empty_like(p.B), torch.empty_like(p.C), torch.zeros_like(p.A)
    ddt, dx = torch.empty_like(dy), torch.empty_like(dy)
    carry = p.A.new_zeros(u.shape[0], *p.A.shape)                    # a_{t+1} g_{t+1} of the chunk to the right
    a, h, g = p.A.new_empty(3, p.size)
    for k, b, t in reversed(p.all):
        h0, right = states[k, b], carry[b]
        a_, h_ = p.states(b, t, h0, a, h)
        if z is not None:
            y[b, t] = over_states(p.C[b, t], h_)
        dC[b, t] = over_channels(h_, dy[b, t])
        g_ = torch.mul(dy[b, t][:, :, None, :], p.C[b, t][:, :, :, None], out=g[:h_.numel()].view(h_.shape))
        for a_t, g_t in zip(reversed(a_.unbind(1)), reversed(g_.unbind(1))):
            g_t.add_(right)
            right = a_t.mul_(g_t)                                    # in place: from here on a_ holds a_t g_t
        carry[b] = right
        dB[b, t] = over_channels(g_, p.x[b, t])
        dx[b, t] = over_states(p.B[b, t], g_)
        w = a_                                                       # and now w_t = a_t g_t h_{t-1}
        w[:, 1:].mul_(h_[:, :-1])
        w[:, 0].mul_(h0)
        ddt[b, t] = torch.mul(w, p.A, out=g_).sum(2)
        dA += torch.mul(w, p.dt[b, t][:, :, None, :], out=g_).sum((0, 1))
    if z is not None:                                                # out = y silu(z), so y is needed once more
        y = y if D is None else y.addcmul_(p.u, p.D)
        dz = dout * y * s * (1 + p.z * (1 - s))
    ddt.addcmul_(p.u, dx)
    if delta_softplus:
        ddt.mul_(torch.sigmoid(p.raw))
    dD, dbias = (dy * p.u).sum((0, 1)), ddt.sum((0, 1))
    du = dx.mul_(p.dt)
    if D is not None:
        du.addcmul_(dy, p.D)
    du, ddelta, dz = (torch.empty_like(like).copy_(grad.transpose(1, 2))
                      for like, grad in ((u, du), (delta, ddt), (u, du) if z is None else (z, dz)))
    return (du, ddelta, dA.t().contiguous(), dB.transpose(1, 2).contiguous(), dC.transpose(1, 2).contiguous(), dD, dz,
            dbias)


# ---------------------------------------------------------------------------------------------- GPU, in Triton

CHUNK = 8  # time steps whose states the backward kernel holds in registers at once

if triton is not None:
    # One program works through one sequence for BLOCK_D channels, with their states in a tile (BLOCK_N, BLOCK_D): the
    # channels lie across the threads, the states of one channel inside one thread, so a sum over states needs no
    # communication. Each tensor comes with its strides, so views need no copy. Offsets are 64-bit: they may pass 2^31.

    LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

    @triton.jit
    def at(ptr, strides, b, c, t):
        """Pointers to element (b, c, t) of a tensor with these strides."""
        return ptr + b * strides[0] + c * strides[1] + tl.cast(t, tl.int64) * strides[2]

    @triton.jit
    def softplus(x):
        """log(1 + exp(x)), without overflow, and to full precision where the result is small."""
        e = tl.exp(-tl.abs(x))
        s = 1.0 + e                      # log(s) e / (s - 1) makes up for what was rounded off in s
        return tl.maximum(x, 0.0) + tl.where(s == 1.0, e, tl.log(s) * (e / tl.where(s == 1.0, 1.0, s - 1.0)))

    @triton.jit
    def sigmoid(x):
        e = tl.exp(-tl.abs(x))
        return tl.where(x >= 0, 1.0, e) / (1.0 + e)

    @triton.jit
    def place(dim, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
        """What this program works on: number of its block of channels, its sequence b, its channels d, the states n."""
        blocks = tl.cdiv(dim, BLOCK_D)
        block = tl.program_id(0) % blocks
        d, n = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        return block.to(tl.int64), (tl.program_id(0) // blocks).to(tl.int64), d.to(tl.int64), n.to(tl.int64)

    @triton.jit
    def discretize_step(u, us, delta, ds, B, Bs, A, bias, b, d, n, t, in_d, in_n, live,
                        SOFTPLUS: tl.constexpr, F: tl.constexpr):
        """-> u_t, dt_t before and after the softplus (BLOCK_D); B_t (BLOCK_N); a_t (BLOCK_N, BLOCK_D).

        A comes multiplied by log2(e): the chip has 2^x and makes e^x from it at the price of one more product.
        Where not live, beyond the end of the sequence, dt is 0, which leaves the state as it is.
        """
        u_t = tl.load(at(u, us, b, d, t), in_d & live, 0.0).to(F)
        raw = tl.load(at(delta, ds, b, d, t), in_d & live, 0.0).to(F) + bias
        dt = raw
        if SOFTPLUS:
            dt = softplus(raw)
        dt = tl.where(live, dt, 0.0)
        B_t = tl.load(at(B, Bs, b, n, t), in_n & live, 0.0).to(F)
        return u_t, raw, dt, B_t, tl.exp2(dt[None, :] * A)

    @triton.jit
    def forward_kernel(u, us, delta, ds, A, As, B, Bs, C, Cs, D, z, zs, bias, out, outs, last, states,
                       batch, dim, seqlen, dstate, SAVE: tl.constexpr, SOFTPLUS: tl.constexpr, F: tl.constexpr,
                       CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
        block, b, d, n = place(dim, BLOCK_N, BLOCK_D)
        in_d, in_n = d < dim, n < dstate
        tile = in_n[:, None] & in_d[None, :]
        A_ = tl.load(A + d[None, :] * As[0] + n[:, None] * As[1], tile, 0.0).to(F) * LOG2_E
        bias_ = tl.zeros((BLOCK_D,), F)
        if bias is not None:
            bias_ += tl.load(bias + d, in_d, 0.0).to(F)
        if D is not None:
            D_ = tl.load(D + d, in_d, 0.0).to(F)
        h = tl.zeros((BLOCK_N, BLOCK_D), F)
        for t in range(seqlen):
            if SAVE:
                if t % CHUNK == 0:
                    k = t // CHUNK * batch + b                                     # states (chunks, batch, dstate, dim)
                    tl.store(states + (k * dstate + n[:, None]) * dim + d[None, :], h, tile)
            u_t, raw, dt, B_t, a = discretize_step(u, us, delta, ds, B, Bs, A_, bias_, b, d, n, t, in_d, in_n,
                                                   t < seqlen, SOFTPLUS, F)
            h = a * h + B_t[:, None] * (dt * u_t)[None, :]
            C_t = tl.load(at(C, Cs, b, n, t), in_n, 0.0).to(F)
            y = tl.sum(C_t[:, None] * h, 0)
            if D is not None:
                y += D_ * u_t
            if z is not None:
                z_t = tl.load(at(z, zs, b, d, t), in_d, 0.0).to(F)
                y *= z_t * sigmoid(z_t)
            tl.store(at(out, outs, b, d, t), y.to(out.dtype.element_ty), in_d)
        tl.store(last + (b * dim + d[None, :]) * dstate + n[:, None], h, tile)

    @triton.jit
    def backward_kernel(dout, dos, u, us, delta, ds, A, As, B, Bs, C, Cs, D, z, zs, bias, states,
                        du, dus, ddelta, dds, dz, dzs, dA, dB, dC, dD, dbias,
                        batch, dim, seqlen, dstate, SOFTPLUS: tl.constexpr, F: tl.constexpr,
                        CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
        block, b, d, n = place(dim, BLOCK_N, BLOCK_D)
        in_d, in_n = d < dim, n < dstate
        tile = in_n[:, None] & in_d[None, :]
        A_ = tl.load(A + d[None, :] * As[0] + n[:, None] * As[1], tile, 0.0).to(F) * LOG2_E
        bias_ = tl.zeros((BLOCK_D,), F)
        if bias is not None:
            bias_ += tl.load(bias + d, in_d, 0.0).to(F)
        if D is not None:
            D_ = tl.load(D + d, in_d, 0.0).to(F)
        dD_sum, dbias_sum = tl.zeros((BLOCK_D,), F), tl.zeros((BLOCK_D,), F)
        dA_sum, right = tl.zeros((BLOCK_N, BLOCK_D), F), tl.zeros((BLOCK_N, BLOCK_D), F)  # right = a_{t+1} g_{t+1}
        chunks = tl.cdiv(seqlen, CHUNK)
        for j in range(chunks):
            first = (chunks - 1 - j) * CHUNK
            k = (chunks - 1 - j) * batch + b
            h = tl.load(states + (k * dstate + n[:, None]) * dim + d[None, :], tile, 0.0)
            hs = (h,)                                                # hs[i] is the state before step first + i
            for i in tl.static_range(CHUNK):
                u_t, raw, dt, B_t, a = discretize_step(u, us, delta, ds, B, Bs, A_, bias_, b, d, n,
                                                       first + i, in_d, in_n, first + i < seqlen, SOFTPLUS, F)
                h = a * h + B_t[:, None] * (dt * u_t)[None, :]
                hs += (h,)
            for i in tl.static_range(CHUNK - 1, -1, -1):
                t = first + i
                live = t < seqlen
                u_t, raw, dt, B_t, a = discretize_step(u, us, delta, ds, B, Bs, A_, bias_, b, d, n,
                                                       t, in_d, in_n, live, SOFTPLUS, F)
                C_t = tl.load(at(C, Cs, b, n, t), in_n & live, 0.0).to(F)
                dy = tl.load(at(dout, dos, b, d, t), in_d & live, 0.0).to(F)
                if z is not None:                                    # out = y silu(z), so y is needed once more
                    z_t = tl.load(at(z, zs, b, d, t), in_d & live, 0.0).to(F)
                    s = sigmoid(z_t)
                    y = tl.sum(C_t[:, None] * hs[i + 1], 0)
                    if D is not None:
                        y += D_ * u_t
                    tl.store(at(dz, dzs, b, d, t), (dy * y * s * (1.0 + z_t * (1.0 - s))).to(dz.dtype.element_ty),
                             in_d & live)
                    dy *= z_t * s
                g = C_t[:, None] * dy[None, :] + right
                right = a * g
                w = right * hs[i]
                dx = tl.sum(B_t[:, None] * g, 0)
                ddt = tl.sum(A_ * w, 0) * LN_2 + u_t * dx
                if SOFTPLUS:
                    ddt *= sigmoid(raw)
                ddt = tl.where(live, ddt, 0.0)
                du_t = dt * dx
                if D is not None:
                    du_t += D_ * dy
                dA_sum += dt[None, :] * w
                dD_sum += dy * u_t
                dbias_sum += ddt
                tl.store(at(du, dus, b, d, t), du_t.to(du.dtype.element_ty), in_d & live)
                tl.store(at(ddelta, dds, b, d, t), ddt.to(ddelta.dtype.element_ty), in_d & live)
                # dB and dC sum over all channels: each block of channels leaves its part, (blocks, batch, seqlen, dstate)
                part = ((block * batch + b) * seqlen + t) * dstate + n
                tl.store(dB + part, tl.sum(g * (dt * u_t)[None, :], 1), in_n & live)
                tl.store(dC + part, tl.sum(hs[i + 1] * dy[None, :], 1), in_n & live)
        # dA, dD and dbias sum over the batch: each sequence leaves its part, (batch, dstate, dim) and (batch, dim)
        row = b * dim + d
        tl.store(dA + (b * dstate + n[:, None]) * dim + d[None, :], dA_sum, tile)
        tl.store(dD + row, dD_sum, in_d)
        tl.store(dbias + row, dbias_sum, in_d)


def launch(u, A):
    """-> grid size and the sizes that both kernels share."""
    f = state_dtype(u)
    block_d = min(64, triton.next_power_of_2(u.shape[1]))
    blocks = triton.cdiv(u.shape[1], block_d)
    sizes = dict(batch=u.shape[0], dim=u.shape[1], seqlen=u.shape[2], dstate=A.shape[1], CHUNK=CHUNK,
                 F=tl.float64 if f == torch.float64 else tl.float32, BLOCK_D=block_d,
                 BLOCK_N=triton.next_power_of_2(A.shape[1]), num_warps=max(1, block_d // 32))
    return f, blocks, sizes


def vector(x):
    return x if x is None else x.contiguous()                        # the kernels read D and delta_bias without strides


def triton_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    """As `cpu_forward`."""
    f, blocks, sizes = launch(u, A)
    batch, dim, seqlen = u.shape
    out, last = torch.empty_like(u), u.new_empty(batch, dim, A.shape[1], dtype=f)
    states = u.new_empty(states_shape(CHUNK, u, A, save), dtype=f)
    if batch:
        forward_kernel[(batch * blocks,)](
            u, u.stride(), delta, delta.stride(), A, A.stride(), B, B.stride(), C, C.stride(), vector(D),
            z, None if z is None else z.stride(), vector(delta_bias), out, out.stride(), last, states,
            SAVE=save, SOFTPLUS=delta_softplus, **sizes)
    return out, last, states


def triton_backward(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus):
    """As `cpu_backward`."""
    f, blocks, sizes = launch(u, A)
    (batch, dim, seqlen), dstate = u.shape, A.shape[1]
    du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(u if z is None else z)
    dA, (dD, dbias) = u.new_empty(batch, dstate, dim, dtype=f), u.new_empty(2, batch, dim, dtype=f)
    dB, dC = u.new_empty(2, blocks, batch, seqlen, dstate, dtype=f)
    if batch:
        backward_kernel[(batch * blocks,)](
            dout, dout.stride(), u, u.stride(), delta, delta.stride(), A, A.stride(), B, B.stride(), C, C.stride(),
            vector(D), z, None if z is None else z.stride(), vector(delta_bias), states, du, du.stride(),
            ddelta, ddelta.stride(), dz, dz.stride(), dA, dB, dC, dD, dbias, SOFTPLUS=delta_softplus, **sizes)
    return (du, ddelta, dA.sum(0).t().contiguous(), dB.sum(0).transpose(1, 2).contiguous(),
            dC.sum(0).transpose(1, 2).contiguous(), dD.sum(0), dz, dbias.sum(0))


# ---------------------------------------------------------------------------------------------- the two operators

def states_shape(chunk, u, A, save):
    """The shape of what is saved for the backward pass: the state before each chunk of time."""
    return -(-u.shape[2] // chunk) if save else 0, u.shape[0], A.shape[1], u.shape[1]


def define_operator(name, forward, backward, chunk):
    """Makes a forward and a backward pass one differentiable operator that torch.compile need not look into.

    chunk(u, A) is the number of time steps between two saved states.
    """
    inputs = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    forward_name, backward_name = f"pathstar::{name}", f"pathstar::{name}_backward"
    torch.library.define(forward_name, f"({inputs} bool delta_softplus, bool save) -> (Tensor, Tensor, Tensor)")
    torch.library.define(backward_name, f"(Tensor dout, {inputs} Tensor states, bool delta_softplus) -> "
                                        f"({', '.join(['Tensor'] * 8)})")
    torch.library.impl(forward_name, "CompositeExplicitAutograd", forward)
    torch.library.impl(backward_name, "CompositeExplicitAutograd", backward)

    @torch.library.register_fake(forward_name)
    def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):  # shapes and dtypes, for torch.compile
        f = state_dtype(u)
        return (torch.empty_like(u), u.new_empty(u.shape[0], *A.shape, dtype=f),
                u.new_empty(states_shape(chunk(u, A), u, A, save), dtype=f))

    @torch.library.register_fake(backward_name)
    def _(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus):
        new = [u.new_empty(shape, dtype=state_dtype(u)) for shape in (A.shape, B.shape, C.shape, u.shape[1:2], u.shape[1:2])]
        return (torch.empty_like(u), torch.empty_like(delta), *new[:4], torch.empty_like(u if z is None else z), new[4])

    def save_inputs(ctx, inputs, output):
        *tensors, ctx.delta_softplus, _ = inputs
        ctx.save_for_backward(*tensors, output[2])

    def differentiate(ctx, dout, dlast, dstates):
        given = ctx.saved_tensors
        grads = getattr(torch.ops.pathstar, f"{name}_backward")(dout, *given, ctx.delta_softplus)
        return *(None if x is None else grad for x, grad in zip(given, grads)), None, None

    torch.library.register_autograd(forward_name, differentiate, setup_context=save_inputs)
    return getattr(torch.ops.pathstar, name)


scan_cpu = define_operator("scan_cpu", cpu_forward, cpu_backward, lambda u, A: TIME)
if triton is not None:
    scan_triton = define_operator("scan_triton", triton_forward, triton_backward, lambda u, A: CHUNK)


def run(operator, inputs, delta_softplus, return_last_state):
    check_arguments(*inputs)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, last, _ = operator(*inputs, delta_softplus, save)
    return (out, last.detach()) if return_last_state else out


def selective_scan_cpu(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                       return_last_state=False):
    """The scan in PyTorch operations on cache-sized pieces. Arguments and results as in `selective_scan`."""
    return run(scan_cpu, (u, delta, A, B, C, D, z, delta_bias), delta_softplus, return_last_state)


def selective_scan_triton(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                          return_last_state=False):
    """The scan as Triton kernels. Arguments and results as in `selective_scan`.

    Raises RuntimeError where Triton cannot run: it needs a GPU, or TRITON_INTERPRET=1 set before Python starts.
    """
    if triton is None or not (u.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError("selective_scan_triton needs triton and tensors on a GPU (or TRITON_INTERPRET=1)")
    return run(scan_triton, (u, delta, A, B, C, D, z, delta_bias), delta_softplus, return_last_state)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                   return_last_state=False):
    """out_t = (<C_t, h_t> + D u_t) silu(z_t) with h_t = exp(dt_t A) h_{t-1} + B_t dt_t u_t.

    A drop-in for `selective_scan_fn` of the mamba_ssm package, for real A and for B, C that vary with time.

    u, delta, z       (batch, dim, seqlen); any strides; z, D and delta_bias may be None
    A                 (dim, dstate), real (negative for a state that decays)
    B, C              (batch, dstate, seqlen)
    D, delta_bias     (dim,)
    delta_softplus    dt = softplus(delta + delta_bias) instead of delta + delta_bias

    Returns out (batch, dim, seqlen) in u's dtype; with return_last_state also h after the last step (batch, dim,
    dstate), through which no gradient flows. States are float32 (float64 for a float64 u) whatever the inputs are.
    Raises ValueError for other shapes and for complex A.
    """
    scan = selective_scan_triton if u.is_cuda and triton is not None else selective_scan_cpu
    return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


# ---------------------------------------------------------------------------------------------- check and benchmark

def example(batch, seqlen, dim, dstate, device="cpu", dtype=torch.float32):
    """-> random u, delta, A, B, C, D, z, delta_bias that require gradients."""
    shapes = [(batch, dim, seqlen)] * 2 + [(dim, dstate)] + [(batch, dstate, seqlen)] * 2 + [(dim,), (batch, dim, seqlen), (dim,)]
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    inputs[2] = -torch.rand(dim, dstate, device=device) * dstate
    return [x.to(dtype if x.dim() == 3 else torch.float32).requires_grad_() for x in inputs]


def both_passes(scan, inputs):
    """-> out, last state and the gradients of sum(out^2)."""
    out, last = scan(*inputs, delta_softplus=True, return_last_state=True)
    return [out, last, *torch.autograd.grad((out * out).sum(), inputs)]


def check(device):
    for scan in (selective_scan_cpu, selective_scan_triton)[device == "cuda":][:1]:
        for shape in ((2, 1, 3, 1), (2, 31, 70, 5), (1, 257, 40, 16)):
            inputs = example(*shape, device=device)
            exact = both_passes(selective_scan_ref, [x.detach().double().requires_grad_() for x in inputs])
            error = max(((x - y).abs().max() / y.abs().max().clamp_min(1e-6)).item()
                        for x, y in zip(both_passes(scan, inputs), exact))
            print(f"{scan.__name__} {shape}: largest error of output, state and gradients {error:.1e} of the largest value")
            assert error < 1e-4, "the implementations disagree"


def benchmark(device):
    """Forward and backward pass, median, against the plain loop differentiated by autograd."""
    from torch.utils.benchmark import Timer
    print(f"{device}, {torch.get_num_threads()} thread(s): forward + backward, (batch, seqlen, dim, dstate)")
    shapes = [(1, 1, 16, 1), (32, 27, 64, 16), (128, 27, 128, 16), (256, 17, 256, 16), (8, 512, 256, 16)]
    for shape in shapes if device == "cpu" else shapes + [(256, 31, 1568, 16), (8, 2048, 1536, 16)]:
        inputs = example(*shape, device=device)
        ms = [Timer("f(scan, inputs)", globals=dict(f=both_passes, scan=scan, inputs=inputs)).blocked_autorange(
              min_run_time=1).median * 1e3 for scan in (selective_scan, selective_scan_ref)]
        print(f"{str(shape):22} {ms[0]:9.3f} ms   plain loop {ms[1]:9.3f} ms   {ms[1] / ms[0]:6.1f} times faster")


if __name__ == "__main__":
    torch.manual_seed(0)
    for machine in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        check(machine)
        benchmark(machine)
