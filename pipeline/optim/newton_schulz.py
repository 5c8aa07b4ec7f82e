"""Newton-Schulz: the nearest (semi-)orthogonal matrix, by matrix products only.

For X = U S V^T an odd polynomial acts on the singular values alone: p(X) = a X + b (X X^T) X + c (X X^T)^2 X has the
singular values a s + b s^3 + c s^5. A few such polynomials, applied after dividing by the Frobenius norm, take every
singular value that matters close to 1, which is U V^T, Muon's update direction.

Coefficients
- `moonlight`: (3.4445, -4.7750, 2.0315) in every step. Steep at zero and not convergent: singular values end anywhere
  in about 0.7 ... 1.2, which training does not mind (Keller Jordan, "Muon"; arXiv 2502.16982 section 2).
- `polar_express`: a different polynomial each step, optimal for singular values above 1e-3 (arXiv 2505.16932), with that
  paper's safety factor 1.01 against bf16 rounding; after five steps the cubic-order limit (15/8, -10/8, 3/8).

Evaluation
- `plain`: the definition above in bf16 on batches of equal shape, on the short side: with s = min, l = max of rows and
  columns a step costs 4 s^2 l + 2 s^3 floating-point operations. Bit for bit what `torch.optim.Muon` does to one matrix
  (CPU; a GPU may pick different kernels for batches).
- `gram`: all polynomials but the last product live on the s x s Gram matrix R = X X^T. With P = a I + b R + c R^2 the
  iterates are X_k = Q_k X, Q <- P Q, R <- P R P. Cheaper for elongated matrices. Squaring halves the digits, so it runs
  in fp16 and starts again from Q X once, after the second step (as Dao-AILab's Gram Newton-Schulz does).

Products (`products.py` says which of them a processor has)
- `half`: the 16-bit products of the device, as above.
- `fp32`: for processors without them, such as x86 CPUs without AVX-512, where torch multiplies bf16 20 to 30 times as
  slowly as fp32. `plain` multiplies in fp32 and rounds every result to bf16, as a bf16 product does, except within the
  last step, whose roundings have no later step to be torch's for. So for gradients of full rank no element is further
  than 2^-7 from `torch.optim.Muon`'s, and the result is nearer to that of exact arithmetic than torch's is. (Where
  singular values span more than the 8 bits of bf16, torch's own kernels, with and without oneDNN, differ by more, too.) `gram` runs
  in fp32 throughout. Matrices are taken one by one, each on one thread: the bits are a function of the matrix alone.

Legend: B matrices in a batch, M rows, N columns; S the short and L the long side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pipeline.optim.products import Products, one_thread_each

Coefficients = Sequence[tuple[float, float, float]]
Backend = Literal["plain", "gram"]

EPS = 1e-7  # floor of the norm: a zero gradient gives a zero update
CPU_TILE = 2**18  # elements of a batch on a CPU: the iterates stay in a core's cache
CPU_ALONE = 16  # short side up to which a CPU takes matrices one by one: see `_tile`
_MOONLIGHT = (3.4445, -4.7750, 2.0315)
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_POLAR_EXPRESS_LIMIT = (1.875, -1.25, 0.375)
_SAFETY = 1.01
_GRAM_RESTART = 2


def coefficients(name: Literal["moonlight", "polar_express"], steps: int) -> Coefficients:
    """(a, b, c) of each of `steps` polynomials."""
    if name == "moonlight":
        return (_MOONLIGHT,) * steps
    safe = [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS]
    return tuple((safe + [_POLAR_EXPRESS_LIMIT] * max(0, steps - len(safe)))[:steps])


def flops(rows: int, columns: int, steps: int, backend: Backend = "plain") -> int:
    """Floating-point operations of an evaluation: the cost by which owners are balanced."""
    short, long = min(rows, columns), max(rows, columns)
    if backend == "plain":
        return steps * (4 * short * short * long + 2 * short**3)
    parts = [part for part in (min(steps, _GRAM_RESTART), steps - _GRAM_RESTART) if part > 0]
    squares = sum(part + (part - 1) + 2 * (part - 1) for part in parts)  # P; P Q; P R P
    return 4 * len(parts) * short * short * long + 2 * squares * short**3


def orthogonalize(
    x_BMN: Tensor, schedule: Coefficients, backend: Backend = "plain", products: Products = "half"
) -> Tensor:
    """Orthogonalises every matrix of a batch.

    Args:
        x_BMN: any floating dtype; cast to bf16 first, whatever the dtype.
        schedule: polynomials, from `coefficients`.
        backend: how to evaluate them.
        products: with which products, from `products.choose`.

    Returns:
        [B, M, N] bf16; a zero matrix stays zero; NaN stays within its own matrix.
    """
    if products == "fp32":
        return torch.stack(one_thread_each(partial(_by_fp32, schedule=schedule, backend=backend), x_BMN.unbind()))
    if x_BMN.device.type == "cpu" and len(x_BMN) > (tile := _tile(x_BMN)):
        return torch.cat([orthogonalize(part_BMN, schedule, backend) for part_BMN in x_BMN.split(tile)])
    x_BSL, tall = _normalize(x_BMN)
    x_BSL = _gram(x_BSL, schedule, torch.float16) if backend == "gram" else _plain(x_BSL, schedule)
    return x_BSL.mT if tall else x_BSL


def _tile(x_BMN: Tensor) -> int:
    """Matrices that a CPU takes at a time: as many as its cache holds, and one where the batch would change the bits.

    torch 2.13 hands a batched 16-bit product to oneDNN if batch x rows x inner x columns exceeds 16^3 and multiplies by a
    kernel of its own otherwise (ATen/native/mkldnn/Matmul.cpp), which sums in another order. Up to a short side of 16 the
    same matrix would meet one or the other according to how many experts its rank has.
    """
    if min(x_BMN.shape[-2:]) <= CPU_ALONE:
        return 1
    return max(1, CPU_TILE // x_BMN[0].numel())


def _normalize(x_BMN: Tensor) -> tuple[Tensor, bool]:
    """Every matrix in bf16, of norm 1 and wide; and whether that transposed it."""
    x_BMN = x_BMN.bfloat16()
    tall = x_BMN.size(-2) > x_BMN.size(-1)
    x_BSL = x_BMN.mT if tall else x_BMN
    # One norm per matrix, not one reduction over the batch: the order of summation, hence the last bit, has to be that
    # of a single matrix.
    norm_B = torch.stack(torch._foreach_norm(list(x_BSL.unbind(0)))).clamp(min=EPS)
    return x_BSL / norm_B.view(-1, 1, 1), tall


def _plain(x_BSL: Tensor, schedule: Coefficients) -> Tensor:
    for a, b, c in schedule:
        gram_BSS = x_BSL @ x_BSL.mT
        poly_BSS = torch.baddbmm(gram_BSS, gram_BSS, gram_BSS, beta=b, alpha=c)
        x_BSL = torch.baddbmm(x_BSL, poly_BSS, x_BSL, beta=a)
    return x_BSL


def _by_fp32(x_MN: Tensor, schedule: Coefficients, backend: Backend) -> Tensor:
    """One matrix by fp32 products."""
    x_BSL, tall = _normalize(x_MN[None])
    x_BSL = x_BSL.to(torch.float32, memory_format=torch.contiguous_format)  # one order in memory, hence of summation
    x_SL = _gram(x_BSL, schedule, torch.float32)[0] if backend == "gram" else _plain_by_fp32(x_BSL[0], schedule)
    return x_SL.mT if tall else x_SL


def _plain_by_fp32(x_SL: Tensor, schedule: Coefficients) -> Tensor:
    next_SL, half_SL = torch.empty_like(x_SL), torch.empty_like(x_SL, dtype=torch.bfloat16)
    gram_SS, poly_SS = x_SL.new_empty(2, len(x_SL), len(x_SL))
    half_SS = torch.empty_like(gram_SS, dtype=torch.bfloat16)
    for step, (a, b, c) in enumerate(schedule, start=1):
        torch.mm(x_SL, x_SL.T, out=gram_SS)
        if step < len(schedule):
            gram_SS.copy_(half_SS.copy_(gram_SS))
        torch.addmm(gram_SS, gram_SS, gram_SS, beta=b, alpha=c, out=poly_SS)
        if step < len(schedule):
            poly_SS.copy_(half_SS.copy_(poly_SS))
        torch.addmm(x_SL, poly_SS, x_SL, beta=a, out=next_SL)
        x_SL.copy_(half_SL.copy_(next_SL))
    return half_SL


def _gram(x_BSL: Tensor, schedule: Coefficients, dtype: torch.dtype) -> Tensor:
    x_BSL = x_BSL.to(dtype)
    for part in (schedule[:_GRAM_RESTART], schedule[_GRAM_RESTART:]):
        if not part:
            continue
        r_BSS = x_BSL @ x_BSL.mT
        q_BSS = None
        for index, (a, b, c) in enumerate(part):
            p_BSS = torch.baddbmm(r_BSS, r_BSS, r_BSS, beta=b, alpha=c)
            p_BSS.diagonal(dim1=-2, dim2=-1).add_(a)
            q_BSS = p_BSS if q_BSS is None else p_BSS @ q_BSS
            if index + 1 < len(part):
                r_BSS = p_BSS @ r_BSS @ p_BSS
        assert q_BSS is not None
        x_BSL = q_BSS @ x_BSL
    return x_BSL.bfloat16()
