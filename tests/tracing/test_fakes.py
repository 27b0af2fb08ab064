"""Fake tensors are like those that a model holds in all but values, and share what these share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from enorm_fx import analyze
from enorm_fx.errors import TraceError
from enorm_fx.tracing.fakes import Fakes
from tests.support.zoo_kit import Net


def held() -> Iterator[Tensor]:
    """Tensors of all kinds that a model may hold."""
    base = torch.randn(6, 4)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        yield nn.Parameter(base.to(dtype), requires_grad=dtype == torch.float32)
    yield from (base, base.t(), base[1:, ::2], base[2], base[0, 0], base.expand(3, 6, 4))
    yield base.to("meta")
    yield nn.Parameter(torch.empty(3, device="meta"))
    yield from (torch.arange(5), torch.tensor(3), torch.tensor(2.0, dtype=torch.float64))
    yield torch.tensor([True, False])
    yield torch.randn(2, 3, dtype=torch.complex64)
    yield torch.randn(2, 3, dtype=torch.complex64).conj()
    yield torch.randn(2, 3, dtype=torch.complex64).conj().imag
    yield torch.eye(3).to_sparse()
    yield torch.empty(0)
    yield torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("tensor", list(held()), ids=lambda t: f"{tuple(t.shape)} {t.dtype}")
def test_a_fake_tensor_is_as_torch_makes_it(tensor: Tensor) -> None:
    fakes = Fakes(nn.Module())
    ours, theirs = fakes.of(tensor), Fakes(nn.Module()).mode.from_tensor(tensor)
    assert type(ours) is type(theirs)
    assert isinstance(ours, nn.Parameter) == isinstance(tensor, nn.Parameter)
    for asked in ("shape", "dtype", "device", "layout"):
        assert getattr(ours, asked) == getattr(theirs, asked)
    assert (ours.is_conj(), ours.is_neg()) == (theirs.is_conj(), theirs.is_neg())
    if tensor.layout is torch.strided:
        assert (ours.stride(), ours.storage_offset()) == (theirs.stride(), theirs.storage_offset())
    assert not ours.requires_grad
    assert fakes.of(tensor) is ours
    assert fakes.real(ours) is tensor


def _memory(fake: Tensor) -> int:
    return int(fake.untyped_storage()._cdata)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_tensors_share_memory_as_the_real_ones_do(first: int) -> None:
    """Whichever of them is met first: a parameter, a view, a view as whole numbers, an entry."""
    base = nn.Parameter(torch.randn(6, 4))
    views = [base, base.detach()[2:], base.detach().view(torch.int32), base.detach()[0, 0]]
    fakes = Fakes(nn.Module())
    found = [fakes.of(view) for view in views[first:] + views[:first]]
    assert len(set(map(_memory, found))) == 1
    assert _memory(fakes.of(torch.randn(6, 4))) != _memory(found[0])


def test_a_whole_number_keeps_its_value_for_python() -> None:
    fakes = Fakes(nn.Module())
    with fakes.mode:
        assert fakes.of(torch.tensor(3)).item() == 3


def test_a_gradient_that_the_model_reads_is_there() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    weight.grad = torch.randn(4, 3)
    fake = Fakes(nn.Module()).of(weight)
    assert fake.grad is not None
    assert fake.grad.shape == (4, 3)
    assert _memory(fake.grad) != _memory(fake)


def test_memory_that_was_freed_is_no_reason_to_fail() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    weight.untyped_storage().resize_(0)
    assert Fakes(nn.Module()).of(weight).shape == (4, 3)


def test_a_negated_view_of_known_memory_is_refused() -> None:
    pairs = torch.randn(3, 2)
    imaginary = torch.view_as_complex(pairs).conj().imag  # negated when it is read
    model = Net(lambda m, x: m.a(x) * m.pairs[:, 0] + m.imaginary, a=nn.Linear(3, 3),
                pairs=pairs, imaginary=imaginary)  # fmt: skip
    with pytest.raises(TraceError, match="conjugated or negated"):
        analyze(model, torch.ones(1, 3), tracer="symbolic")
