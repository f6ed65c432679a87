"""Optimal students beyond the plain one: long sides, known output moments, changed inputs, an output metric.

The optimum of a layer (see `lowrank`) needs only Cov y, the mean of x and W. So of two moment matrices, of x or of y, the smaller
one will do, and where d_out > d_in the eigenproblem lives in the range of W, which a QR decomposition finds.

Inputs x~ that compressed layers upstream have changed, and a metric G on the output (a known next layer H gives G = H^T H):

    min over rank-r M, b of E (y - M x~ - b)^T G (y - M x~ - b)  with  M* = W + (S_{y x~} - W S~) (S~ + rho)^{-1},
    U = top eigenvectors of G^{1/2} M* (S~ + rho) M*^T G^{1/2},   B = G^{-1/2} U,   A = U^T G^{1/2} M*.

The ridge rho draws M* towards W, not towards zero: directions that the calibration rows never show keep the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distil_rank.layers.lowrank import LowRankLinear, check_rank, leading_eigenpairs
from distil_rank.statistics.moments import Moments, symmetric_product

RIDGE = 1e-3  # of the mean variance of x~
METRIC_FLOOR = 1e-4  # of the mean of G's diagonal, added to it: directions nobody reads still count a little


@dataclass(frozen=True)
class Spectrum:
    """The students of one layer at every rank up to k, without the layer itself (float64)."""

    eigenvalues: Tensor  # of Cov y, descending (k,)
    basis: Tensor  # U (d_out, k)
    centre: Tensor  # W mu (d_out,)
    variance: float  # trace of Cov y

    @property
    def tails(self) -> Tensor:
        """Loss sum_{i>r} lambda_i at rank 0, 1, ... k (k + 1,)."""
        heads = torch.cat([self.eigenvalues.new_zeros(1), self.eigenvalues.cumsum(0)])
        return (self.variance - heads).clamp_min(0)

    def fvu(self, rank: int) -> float:
        return float(self.tails[rank]) / self.variance if self.variance > 0 else 0.0

    def student(self, weight: Tensor, bias: Tensor | None, rank: int) -> LowRankLinear:
        """The optimum at this rank for weight (d_out, d_in), in the weight's dtype; a layer without bias gets one."""
        check_rank(rank, len(self.eigenvalues))
        W, U = weight.detach().to(self.basis), self.basis[:, :rank]
        shift = self.centre - U @ (U.T @ self.centre)
        b = shift if bias is None else shift + bias.detach().to(shift)
        return LowRankLinear((U.T @ W).to(weight.dtype), U.to(weight.dtype), b.to(weight.dtype))


def spectrum_from_inputs(weight: Tensor, moments: Moments, limit: int | None = None) -> Spectrum:
    """From the moments of x (d_in,), solved in min(d_in, d_out) dimensions; the `limit` largest eigenvalues."""
    W = weight.detach().to(moments.mean)
    covariance, lift = output_covariance(W, moments.covariance)
    eigenvalues, basis = leading_eigenpairs(covariance, limit or min(W.shape))
    basis = basis if lift is None else lift @ basis
    return Spectrum(eigenvalues, basis, W @ moments.mean, float(covariance.trace()))


def spectrum_from_outputs(weight: Tensor, bias: Tensor | None, outputs: Moments, limit: int | None = None) -> Spectrum:
    """The same from the moments of y = W x + c (d_out,): the inputs are not needed."""
    covariance = outputs.covariance
    eigenvalues, basis = leading_eigenpairs(covariance, limit or min(weight.shape))
    centre = outputs.mean if bias is None else outputs.mean - bias.detach().to(outputs.mean)
    return Spectrum(eigenvalues, basis, centre, float(covariance.trace()))


def output_covariance(W: Tensor, S: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cov(W x) = W S W^T, or where d_out > d_in its matrix R S R^T in the range of W = Q R, with that Q (d_out, d_in)."""
    if len(W) <= W.shape[1]:
        return symmetric_product(W @ S, W.T), None
    Q, R = torch.linalg.qr(W)
    return symmetric_product(R @ S, R.T), Q


@dataclass(frozen=True)
class Drift:
    """Second moments of a layer whose inputs have changed: of x~ (d_in,) and of the teacher's y (d_out,), jointly."""

    rows: float
    input_mean: Tensor  # (d_in,)
    output_mean: Tensor  # (d_out,)
    inputs: Tensor  # S~ = Cov x~ (d_in, d_in)
    cross: Tensor  # S_{y x~} (d_out, d_in)
    outputs: Tensor  # Cov y (d_out, d_out)

    @classmethod
    def none(cls, weight: Tensor, bias: Tensor | None, moments: Moments) -> Drift:
        """Unchanged inputs: x~ = x."""
        W, S = weight.detach().to(moments.mean), moments.covariance
        mean = W @ moments.mean
        mean = mean if bias is None else mean + bias.detach().to(mean)
        return cls(moments.count, moments.mean, mean, S, W @ S, symmetric_product(W @ S, W.T))

    @classmethod
    def of(cls, joint: Moments, d_in: int) -> Drift:
        """From the moments of the concatenated rows [x~, y]."""
        mean, covariance = joint.mean, joint.covariance
        blocks = covariance[:d_in, :d_in], covariance[d_in:, :d_in], covariance[d_in:, d_in:]
        return cls(joint.count, mean[:d_in], mean[d_in:], *blocks)

    def fvu(self, student: LowRankLinear) -> float:
        """FVU of a student fed with x~, against the teacher's own output, from the stored factors."""
        A, B = student.A.weight.detach().to(self.inputs), student.B.weight.detach().to(self.inputs)
        shift = self.output_mean - B @ (A @ self.input_mean)
        if student.B.bias is not None:
            shift = shift - student.B.bias.detach().to(shift)
        covariance = A @ self.inputs @ A.T
        mse = self.outputs.trace() - 2 * (B * (self.cross @ A.T)).sum() + ((B @ covariance) * B).sum() + shift @ shift
        variance = self.outputs.trace()
        return float(mse / variance) if variance > 0 else 0.0


def drifted_student(
    weight: Tensor, drift: Drift, rank: int, ridge: float = RIDGE, metric: Tensor | None = None
) -> LowRankLinear:
    """Best rank-r student (float64) that reads x~ and imitates y = W x + c; metric (d_out, d_out) or None for the identity.

    ridge = inf keeps M* = W, which is exact for unchanged inputs and needs no inverse.
    """
    check_rank(rank, min(weight.shape))
    full, S = drifted_map(weight, drift, ridge)
    root, inverse = (None, None) if metric is None else _decomposed(metric.to(full))
    left = full if root is None else root @ full
    covariance, lift = output_covariance(left, S)
    U = leading_eigenpairs(covariance, rank)[1]
    U = U if lift is None else lift @ U
    A = U.T @ left
    B = U if inverse is None else inverse @ U
    return LowRankLinear(A, B, drift.output_mean - B @ (A @ drift.input_mean))


def drifted_map(weight: Tensor, drift: Drift, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """M* (d_out, d_in), the best map of full rank, and S~ + rho (d_in, d_in)."""
    W, S = weight.detach().to(drift.inputs), drift.inputs
    if ridge == math.inf:
        return W, S
    S = S + ridge * S.trace().clamp_min(1e-300) / len(S) * torch.eye(len(S)).to(W)
    return W + torch.linalg.solve(S, (drift.cross - W @ drift.inputs).T).T, S


def metric_root(metric: Tensor) -> Tensor:
    """G^{1/2} of a positive semi-definite G, lifted as in `drifted_student`."""
    return _decomposed(metric)[0]


def _decomposed(G: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh((G + G.T) / 2)
    values = values.clamp_min(0) + METRIC_FLOOR * G.trace().clamp_min(1e-300) / len(G)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
