"""Sparse SwiGLU experts, and a whole layer with its router, for small batches on a CPU, compiled: what serving runs.

A few rows are over before the dozen operators of an eager layer have been dispatched, so all of it is one call on one
thread: no thread pool to wake up, nothing that waits for a core which other work has. Rows of one expert are taken in
blocks, so that its weights come from memory once a block.
"""

# T rows, K chosen, P pairs sorted by expert, D model width, H hidden width, E experts, A of them for all rows

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 16
_float, _int = np.float32, np.int32


@njit(fastmath=True, error_model="numpy", nogil=True, cache=True)
def _sigmoid(v):
    """2^t by a polynomial and the bits of the exponent, so that loops over it take several at once."""
    t = min(max(v * _float(-1.4426950408889634), _float(-126.0)), _float(126.0))
    whole = np.floor(t + _float(0.5))
    part = t - whole
    power = _float(1.54035304e-4)  # (ln 2)^n / n!, n = 6 … 0
    power = power * part + _float(1.33335581e-3)
    power = power * part + _float(9.61812911e-3)
    power = power * part + _float(5.55041087e-2)
    power = power * part + _float(2.40226507e-1)
    power = power * part + _float(6.93147181e-1)
    power = power * part + _float(1.0)
    scale = _int((_int(whole) + _int(127)) << _int(23)).view(np.float32)
    return _float(1.0) / (_float(1.0) + power * scale)


@njit(fastmath=True, error_model="numpy", nogil=True, cache=True)
def _product(a, w, out, num_rows):
    """out[:num_rows] = a[:num_rows] @ w, four rows of w and two of a at a time; the depth is a multiple of four."""
    for r in range(num_rows):
        for j in range(w.shape[1]):
            out[r, j] = 0.0
    for k in range(0, w.shape[0], 4):
        w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
        for r in range(0, num_rows - 1, 2):
            top, low = out[r], out[r + 1]
            a0, a1, a2, a3 = a[r, k], a[r, k + 1], a[r, k + 2], a[r, k + 3]
            b0, b1, b2, b3 = a[r + 1, k], a[r + 1, k + 1], a[r + 1, k + 2], a[r + 1, k + 3]
            for j in range(w.shape[1]):
                top[j] += a0 * w0[j] + a1 * w1[j] + a2 * w2[j] + a3 * w3[j]
                low[j] += b0 * w0[j] + b1 * w1[j] + b2 * w2[j] + b3 * w3[j]
        if num_rows % 2:
            last = out[num_rows - 1]
            c0, c1, c2, c3 = (
                a[num_rows - 1, k],
                a[num_rows - 1, k + 1],
                a[num_rows - 1, k + 2],
                a[num_rows - 1, k + 3],
            )
            for j in range(w.shape[1]):
                last[j] += c0 * w0[j] + c1 * w1[j] + c2 * w2[j] + c3 * w3[j]


@njit(fastmath=True, error_model="numpy", nogil=True, cache=True)
def _product_back(a, w, out, num_rows):
    """out[:num_rows] = a[:num_rows] @ w.T."""
    for r in range(num_rows):
        left = a[r]
        for i in range(w.shape[0]):
            right, total = w[i], _float(0.0)
            for j in range(w.shape[1]):
                total += left[j] * right[j]
            out[r, i] = total


@njit(nogil=True, cache=True)
def _sorted_pairs(expert_TK, gate_TK, num_experts, num_always):
    """Row and gate of every pair in order of experts, and where each expert's begin."""
    T, K = expert_TK.shape
    routed = num_experts - num_always
    start = np.zeros(num_experts + 1, np.int64)
    for t in range(T):
        for k in range(K):
            if expert_TK[t, k] >= 0:
                start[expert_TK[t, k] + 1] += 1
    for e in range(routed, num_experts):
        start[e + 1] = T
    start = np.cumsum(start)
    row, gate, place = np.empty(start[-1], np.int64), np.ones(start[-1], np.float32), start.copy()
    for t in range(T):
        for k in range(K):
            e = expert_TK[t, k]
            if e >= 0:
                row[place[e]], gate[place[e]] = t, gate_TK[t, k]
                place[e] += 1
        for e in range(routed, num_experts):
            row[start[e] + t] = t
    return row, gate, start


@njit(fastmath=True, error_model="numpy", nogil=True, cache=True)
def _run(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK, num_always, y_TD):
    D, H, E = x_TD.shape[1], w_out_EHD.shape[1], len(w_in_EDF)
    row, gate, start = _sorted_pairs(expert_TK, gate_TK, E, num_always)
    x, y = np.empty((_BLOCK, D), np.float32), np.empty((_BLOCK, D), np.float32)
    inner, hidden = np.empty((_BLOCK, 2 * H), np.float32), np.empty((_BLOCK, H), np.float32)
    y_TD[:] = 0.0
    for e in range(E):
        for first in range(start[e], start[e + 1], _BLOCK):
            num_rows = min(_BLOCK, start[e + 1] - first)
            for r in range(num_rows):
                x[r] = x_TD[row[first + r]]
            _product(x, w_in_EDF[e], inner, num_rows)
            for r in range(num_rows):
                out, left, right, weight = hidden[r], inner[r, :H], inner[r, H:], gate[first + r]
                for j in range(H):
                    out[j] = left[j] * _sigmoid(left[j]) * right[j] * weight
            _product(hidden, w_out_EHD[e], y, num_rows)
            for r in range(num_rows):
                total, part = y_TD[row[first + r]], y[r]
                for j in range(D):
                    total[j] += part[j]


@njit(fastmath=True, error_model="numpy", nogil=True, cache=True)
def _run_back(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK, num_always, dy_TD, dx_TD, dgate_TK):
    """Gradients with respect to x and the gates."""
    D, H, E = x_TD.shape[1], w_out_EHD.shape[1], len(w_in_EDF)
    row, gate, start = _sorted_pairs(expert_TK, gate_TK, E, num_always)
    x, dy = np.empty((_BLOCK, D), np.float32), np.empty((_BLOCK, D), np.float32)
    inner, dhidden = np.empty((_BLOCK, 2 * H), np.float32), np.empty((_BLOCK, H), np.float32)
    dx_TD[:], dgate_TK[:] = 0.0, 0.0
    for e in range(E):
        for first in range(start[e], start[e + 1], _BLOCK):
            num_rows = min(_BLOCK, start[e + 1] - first)
            for r in range(num_rows):
                x[r], dy[r] = x_TD[row[first + r]], dy_TD[row[first + r]]
            _product(x, w_in_EDF[e], inner, num_rows)
            _product_back(dy, w_out_EHD[e], dhidden, num_rows)
            for r in range(num_rows):
                up, left, right, weight = dhidden[r], inner[r, :H], inner[r, H:], gate[first + r]
                dgate = _float(0.0)
                for j in range(H):
                    part = _sigmoid(left[j])
                    silu = left[j] * part
                    dgate += up[j] * silu * right[j]
                    dsilu = up[j] * weight * right[j]
                    right[j] = up[j] * weight * silu
                    left[j] = dsilu * (part + silu * (_float(1.0) - part))
                t = row[first + r]
                for k in range(expert_TK.shape[1]):
                    if expert_TK[t, k] == e:
                        dgate_TK[t, k] = dgate
            _product_back(inner, w_in_EDF[e], dy, num_rows)
            for r in range(num_rows):
                total, part_D = dx_TD[row[first + r]], dy[r]
                for d in range(D):
                    total[d] += part_D[d]


@njit(fastmath=True, error_model="numpy", nogil=True, cache=True)
def _route(x_TD, weight_ED, steer_E, sigmoid, expert_TK, gate_TK):
    """The K experts of largest score + steering, and their scores without it, which add up to one."""
    T, K = expert_TK.shape
    D, E = x_TD.shape[1], len(weight_ED)
    score, choice = np.empty(E, np.float32), np.empty(E, np.float32)
    for t in range(T):
        x = x_TD[t]
        for e in range(E):
            w, total = weight_ED[e], _float(0.0)
            for d in range(D):
                total += x[d] * w[d]
            score[e] = _float(1.0) / (_float(1.0) + np.exp(-total)) if sigmoid else total
            choice[e] = score[e] + steer_E[e]
        if not sigmoid:
            highest = score.max()
            for e in range(E):
                score[e] = np.exp(score[e] - highest)
        total = _float(0.0)
        for k in range(K):
            best = choice.argmax()
            expert_TK[t, k], gate_TK[t, k], choice[best] = best, score[best], _float(-3e38)
            total += score[best]
        for k in range(K):
            gate_TK[t, k] /= total


@njit(fastmath=True, error_model="numpy", nogil=True, cache=True)
def _route_back(x_TD, weight_ED, sigmoid, expert_TK, gate_TK, dgate_TK, dx_TD):
    """Adds what the gates' gradients are with respect to x. gate_k = s_k / Σ s, s = exp or sigmoid of a linear map."""
    T, K = expert_TK.shape
    D = x_TD.shape[1]
    score = np.ones(K, np.float32)
    for t in range(T):
        x, dx, mean = x_TD[t], dx_TD[t], _float(0.0)
        for k in range(K):
            mean += gate_TK[t, k] * dgate_TK[t, k]
        if sigmoid:
            for k in range(K):
                w, logit = weight_ED[expert_TK[t, k]], _float(0.0)
                for d in range(D):
                    logit += x[d] * w[d]
                score[k] = _sigmoid(logit)
        for k in range(K):
            # ds / dlogit is s, or s (1 - s) of a sigmoid; the sum of scores cancels.
            slope = gate_TK[t, k] * (dgate_TK[t, k] - mean)
            if sigmoid:
                slope *= _float(1.0) - score[k]
            w = weight_ED[expert_TK[t, k]]
            for d in range(D):
                dx[d] += slope * w[d]


@njit(nogil=True, cache=True)
def _run_layer(x_TD, weight_ED, steer_E, sigmoid, w_in_EDF, w_out_EHD, num_always, expert_TK, gate_TK, y_TD):
    _route(x_TD, weight_ED, steer_E, sigmoid, expert_TK, gate_TK)
    _run(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK, num_always, y_TD)


class CompiledLayer:
    """Router and experts of one layer in one call; made once, since looking at tensors takes longer than a row does.

    Scores are a linear map of x, softmax or sigmoid of it. steer_E: added to scores (softmax: to logits) for choosing.
    The rest as in `experts.expert_swiglu`. Weights are looked at in place: a change of their numbers counts.
    """

    def __init__(
        self,
        weight_ED: Tensor,
        steer_E: Tensor | None,
        w_in_EDF: Tensor,
        w_out_EHD: Tensor,
        *,
        sigmoid: bool,
        top_k: int,
        num_always: int,
    ) -> None:
        steer_E = torch.zeros(len(weight_ED)) if steer_E is None else steer_E
        self._weight, self._steer, self._w_in, self._w_out = _arrays(weight_ED, steer_E, w_in_EDF, w_out_EHD)
        self._sigmoid, self._top_k, self._num_always = sigmoid, top_k, num_always

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y (T, D), the chosen experts (T, K) and their gates. y is differentiable in x, and in nothing else."""
        y, expert, gate = _LayerCall.apply(x_TD, self)  # type: ignore[no-untyped-call]
        return y, expert, gate

    def run(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """The same on arrays."""
        T = len(x)
        expert, gate = np.empty((T, self._top_k), np.int64), np.empty((T, self._top_k), np.float32)
        y = np.empty(x.shape, np.float32)
        _run_layer(
            x, self._weight, self._steer, self._sigmoid, self._w_in, self._w_out, self._num_always, expert, gate, y
        )
        return y, expert, gate

    def gradient(
        self, x: NDArray[np.float32], expert: NDArray[np.int64], gate: NDArray[np.float32], dy: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """With respect to x; which experts are chosen is taken as given."""
        dx, dgate = np.empty(x.shape, np.float32), np.empty(gate.shape, np.float32)
        _run_back(x, self._w_in, self._w_out, expert, gate, self._num_always, dy, dx, dgate)
        _route_back(x, self._weight, self._sigmoid, expert, gate, dgate, dx)
        return dx


class _LayerCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, layer: CompiledLayer) -> tuple[Tensor, Tensor, Tensor]:
        (x,) = _arrays(x_TD)
        y, expert, gate = layer.run(x)
        ctx.call = layer, x, expert, gate
        chosen = torch.from_numpy(expert), torch.from_numpy(gate)
        ctx.mark_non_differentiable(*chosen)
        return torch.from_numpy(y), *chosen

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer, x, expert, gate = ctx.call
        (dy,) = _arrays(gradients[0])
        return torch.from_numpy(layer.gradient(x, expert, gate, dy)), None


def expert_swiglu(
    x_TD: Tensor, w_in_EDF: Tensor, w_out_EHD: Tensor, expert_TK: Tensor, gate_TK: Tensor, *, num_always: int
) -> Tensor:
    """See `experts.expert_swiglu`; float32, no gradients, widths that are multiples of four."""
    y_TD = torch.empty(x_TD.shape)
    x, w_in, w_out, expert, gate = _arrays(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK)
    _run(x, w_in, w_out, expert, gate, num_always, y_TD.numpy())
    return y_TD


def _arrays(*tensors: Tensor) -> list[NDArray[Any]]:
    whole = [t if t.is_contiguous() else t.contiguous() for t in tensors]
    return [(t.detach() if t.requires_grad else t).numpy() for t in whole]
