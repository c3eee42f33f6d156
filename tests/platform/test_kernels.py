"""Fused expert products against one row and one expert at a time: values and gradients."""

import pytest
import torch
from assay_platform.kernels import expert_swiglu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def obvious(x_TD: Tensor, w_in: Tensor, w_out: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    rows = []
    for t in range(len(x_TD)):
        y = torch.zeros_like(x_TD[t])
        for e, weight in zip(expert_TK[t].tolist(), gate_TK[t], strict=True):
            gate, up = (x_TD[t] @ w_in[e]).chunk(2)
            y = y + weight * ((silu(gate) * up) @ w_out[e])
        rows.append(y)
    return torch.stack(rows) if rows else x_TD * 1.0


def inputs(T: int, D: int, H: int, E: int, K: int, *, all_on_one: bool, seed: int = 0) -> Inputs:
    """In float64, the experts chosen as a softmax router would."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = normal(T, E)
    if all_on_one:
        logits[:, E // 2] += 100
    gate, expert = torch.softmax(logits, -1).topk(K, -1)
    return normal(T, D), normal(E, D, 2 * H) / D**0.5, normal(E, H, D) / H**0.5, expert, gate.float()


def gradients(y: Tensor, of: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, of, dy.to(y.dtype))


def check(given_inputs: Inputs, device: str, dtype: torch.dtype, tolerance: float) -> None:
    x, w_in, w_out, expert, gate = given_inputs
    exact = [t.clone().requires_grad_() for t in (x, w_in, w_out, gate)]
    expected = obvious(exact[0], exact[1], exact[2], expert, exact[3])
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = [t.to(device, dtype).requires_grad_() for t in (x, w_in, w_out)] + [gate.to(device).requires_grad_()]

    def run() -> Tensor:
        return expert_swiglu(ours[0], ours[1], ours[2], expert.to(device), ours[3])

    y = run()
    assert y.dtype == dtype
    found = (y, *gradients(y, ours, dy.to(device)))
    again = run()
    assert all(torch.equal(a, b) for a, b in zip(found, (again, *gradients(again, ours, dy.to(device))), strict=True))
    for a, b in zip(found, (expected, *gradients(expected, exact, dy)), strict=True):
        assert (a.double().cpu() - b).norm() <= tolerance * (b.norm() + 1e-6)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 30), D=st.integers(1, 20), H=st.integers(1, 20), E=st.integers(1, 8), K=st.integers(1, 3),
    all_on_one=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_eager_form_equals_the_obvious_loop(
    T: int, D: int, H: int, E: int, K: int, all_on_one: bool, seed: int
) -> None:
    check(inputs(T, D, H, E, min(K, E), all_on_one=all_on_one, seed=seed), "cpu", torch.float64, 1e-5)


def test_no_rows_give_no_rows() -> None:
    x, w_in, w_out, expert, gate = inputs(3, 4, 5, 2, 1, all_on_one=False)
    assert expert_swiglu(x[:0], w_in, w_out, expert[:0], gate[:0]).shape == (0, 4)


def test_autocast_computes_in_its_type_and_gradients_keep_theirs() -> None:
    x, w_in, w_out, expert, gate = inputs(6, 8, 8, 4, 2, all_on_one=False)
    leaf = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = expert_swiglu(leaf, w_in.float(), w_out.float(), expert, gate)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32


# Rows, widths no power of two or multiple of 16, more experts than pairs, tiles of each size, one expert for all.
SHAPES = [
    (1, 64, 32, 8, 2), (37, 48, 40, 6, 3), (300, 65, 33, 5, 2), (3, 256, 128, 16, 8), (70, 72, 50, 300, 2),
    (200, 136, 72, 1, 1), (400, 128, 96, 4, 2), (600, 128, 64, 4, 2),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("all_on_one", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_triton_form_equals_the_obvious_loop(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, tolerance: float, all_on_one: bool
) -> None:
    check(inputs(*shape, all_on_one=all_on_one), "cuda", dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("num_rows", [1, 700, 40_000])
@pytest.mark.parametrize("num_experts", [1, 5, 64, 300])
def test_pairs_are_sorted_stably(num_rows: int, num_experts: int) -> None:
    from assay_platform.kernels.experts_triton import sort_pairs

    expert = torch.randint(0, num_experts, (num_rows, 4), device="cuda")
    order, bounds = sort_pairs(expert, num_experts)
    places, expected = torch.sort(expert.reshape(-1), stable=True)
    assert torch.equal(order.long(), expected)
    assert torch.equal(bounds.long(), torch.searchsorted(places, torch.arange(num_experts + 1, device="cuda")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_triton_form_takes_strides_autocast_and_the_compiler() -> None:
    x, w_in, w_out, expert, gate = (t.cuda() for t in inputs(90, 64, 32, 8, 2, all_on_one=False))
    x, w_in, w_out = x.float(), w_in.float(), w_out.float()
    expected = expert_swiglu(x, w_in, w_out, expert, gate, backend="eager")
    wide = torch.cat([x, x], 1)[:, :64]
    torch.testing.assert_close(expert_swiglu(wide, w_in, w_out, expert, gate), expected, rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(lambda *a: expert_swiglu(*a) * 2, fullgraph=True)
    y = compiled(leaf, w_in, w_out, expert, gate)
    torch.testing.assert_close(y, 2 * expected, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    with torch.autocast("cuda", torch.bfloat16):
        assert expert_swiglu(leaf, w_in, w_out, expert, gate).dtype == torch.bfloat16
