"""Fused expert products against one row and one expert at a time: values and gradients."""

import pytest
import torch
from assay_platform.kernels import expert_swiglu, layer_norm_gelu_residual
from assay_platform.kernels.experts import compilable, fits_compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def obvious(x_TD: Tensor, w_in: Tensor, w_out: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    rows = []
    for t in range(len(x_TD)):
        y = 0.0 * (x_TD[t] + w_in.sum() + w_out.sum() + gate_TK.sum())  # so that there is a gradient to compare with
        for e, weight in zip(expert_TK[t].tolist(), gate_TK[t], strict=True):
            if e < 0:
                continue
            gate, up = (x_TD[t] @ w_in[e]).chunk(2)
            y = y + weight * ((silu(gate) * up) @ w_out[e])
        rows.append(y)
    return torch.stack(rows) if rows else x_TD * 1.0


def inputs(T: int, D: int, H: int, E: int, K: int, *, all_on_one: bool, partial: bool = False, seed: int = 0) -> Inputs:
    """In float64, the experts chosen as a softmax router would. partial: some rows have fewer experts, or none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = normal(T, E)
    if all_on_one:
        logits[:, E // 2] += 100
    gate, expert = torch.softmax(logits, -1).topk(K, -1)
    if partial:
        gone = torch.rand(T, K, generator=generator) < 0.4
        gate, expert = gate.masked_fill(gone, 0.0), expert.masked_fill(gone, -1)
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
        partial = bool((expert < 0).any())
        return expert_swiglu(ours[0], ours[1], ours[2], expert.to(device), ours[3], partial=partial)

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
    all_on_one=st.booleans(), partial=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_eager_form_equals_the_obvious_loop(
    T: int, D: int, H: int, E: int, K: int, all_on_one: bool, partial: bool, seed: int
) -> None:
    given_inputs = inputs(T, D, H, E, min(K, E), all_on_one=all_on_one, partial=partial, seed=seed)
    check(given_inputs, "cpu", torch.float64, 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 60), D=st.sampled_from([4, 8, 20, 64]), H=st.sampled_from([4, 12, 32]), E=st.integers(1, 8),
    K=st.integers(1, 3), all_on_one=st.booleans(), partial=st.booleans(), num_always=st.integers(0, 2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_compiled_form_equals_the_obvious_loop(
    T: int, D: int, H: int, E: int, K: int, all_on_one: bool, partial: bool, num_always: int, seed: int
) -> None:
    x, w_in, w_out, expert, gate = inputs(
        T, D, H, E + num_always, min(K, E), all_on_one=all_on_one, partial=partial, seed=seed
    )
    expert = torch.where(expert < 0, expert, expert % E)
    expert[:, 1:] = torch.where(expert[:, 1:] == expert[:, :1], -1, expert[:, 1:])
    always = torch.arange(E, E + num_always).expand(T, -1)
    expected = obvious(x, w_in, w_out, torch.cat([expert, always], 1), torch.cat([gate, torch.ones(T, num_always)], 1))
    arguments = (x.float(), w_in.float(), w_out.float(), expert, gate)
    with torch.inference_mode():
        for backend in ("numba", "eager"):
            y = expert_swiglu(*arguments, num_always=num_always, partial=True, backend=backend)
            torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-4)


def test_the_compiled_form_is_chosen_for_small_batches_without_gradients_alone() -> None:
    x, w_in, w_out, expert, gate = inputs(300, 8, 8, 4, 2, all_on_one=False)
    x, w_in, w_out = x.float(), w_in.float(), w_out.float()
    with torch.no_grad():
        assert fits_compiled(x[:5])
        assert not fits_compiled(x)
        assert not fits_compiled(x[:5].bfloat16())
        assert compilable(w_out[0])
        assert not compilable(w_out[0, :, :7])
        assert not compilable(w_out[0].bfloat16())
        large = expert_swiglu(x * 1e4, w_in, w_out, expert, gate)
        torch.testing.assert_close(expert_swiglu(x[:5] * 1e4, w_in, w_out, expert[:5], gate[:5]), large[:5])
    assert not fits_compiled(x[:5])


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
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("all_on_one", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_triton_form_equals_the_obvious_loop(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, tolerance: float, all_on_one: bool, partial: bool
) -> None:
    check(inputs(*shape, all_on_one=all_on_one, partial=partial), "cuda", dtype, tolerance)


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


# ------------------------------------------------------------------------------------- LayerNorm + GELU + residual


def obvious_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """From the definitions, a row at a time."""
    rows = []
    for n in range(len(x)):
        centred = x[n] - x[n].mean()
        z = centred / (centred.square().mean() + 1e-5).sqrt() * weight + bias
        rows.append(z * 0.5 * (1 + torch.erf(z / 2**0.5)) + residual[n])
    return torch.stack(rows) if rows else x * 1.0


def check_norm(N: int, D: int, device: str, types: tuple[torch.dtype, torch.dtype], tolerance: float) -> None:
    generator = torch.Generator().manual_seed(N + D)
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (D,), (D,), (N, D))]
    exact[0] = exact[0] * 3 + 5  # a mean far from zero
    dtypes = (types[0], torch.float32, torch.float32, types[1])
    ours = [t.to(device, dtype).requires_grad_() for t, dtype in zip(exact, dtypes, strict=True)]
    exact = [t.detach().cpu().double().requires_grad_() for t in ours]
    dy = torch.randn((N, D), generator=generator).to(types[1])
    expected = obvious_norm(*exact)

    def run() -> tuple[Tensor, ...]:
        y = layer_norm_gelu_residual(*ours)
        return y, *torch.autograd.grad(y, ours, dy.to(device))

    found, again = run(), run()
    assert found[0].dtype == types[1]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for a, b in zip(found, (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        # Narrow rows have gradients of almost nothing: differences of numbers as large as dy.
        assert (a.double().cpu() - b).norm() <= tolerance * (b.norm() + 0.1 * dy.double().norm())


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(1, 20), D=st.integers(8, 40)
)  # two or three numbers may lie so close that float32 sees no deviation
def test_the_eager_norm_equals_the_definition(N: int, D: int) -> None:
    check_norm(N, D, "cpu", (torch.float32, torch.float32), 1e-4)
    check_norm(N, D, "cpu", (torch.bfloat16, torch.float32), 1e-2)


def test_norm_refuses_a_residual_of_another_shape_and_takes_no_rows() -> None:
    one = torch.ones(4)
    with pytest.raises(ValueError, match=r"x is \(2, 4\) and the residual \(3, 4\)"):
        layer_norm_gelu_residual(torch.ones(2, 4), one, one, torch.ones(3, 4))
    assert layer_norm_gelu_residual(torch.ones(0, 4), one, one, torch.ones(0, 4)).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("types", "tolerance"),
    [
        ((torch.float32, torch.float32), 2e-6),
        ((torch.bfloat16, torch.bfloat16), 5e-3),
        ((torch.bfloat16, torch.float32), 5e-3),
    ],
)
@pytest.mark.parametrize(("N", "D"), [(1, 8), (1, 2), (3, 1000), (777, 96), (2000, 1024), (300, 4096), (130, 5000)])
def test_the_triton_norm_equals_the_definition(
    N: int, D: int, types: tuple[torch.dtype, torch.dtype], tolerance: float
) -> None:
    check_norm(N, D, "cuda", types, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_triton_norm_takes_strides_and_the_compiler() -> None:
    x, residual = torch.randn(64, 50, device="cuda").T, torch.randn(50, 64, device="cuda")
    weight, bias = torch.randn(64, device="cuda"), torch.randn(64, device="cuda", requires_grad=True)
    expected = layer_norm_gelu_residual(x, weight, bias, residual, backend="eager")
    torch.testing.assert_close(layer_norm_gelu_residual(x, weight, bias, residual), expected, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(lambda *a: layer_norm_gelu_residual(*a) * 2, fullgraph=True)
    y = compiled(x, weight, bias, residual)
    torch.testing.assert_close(y, 2 * expected, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert bias.grad is not None
