"""The algebra of a Gaussian process whose past and future meet in a state of a few numbers: O(T).

    s_t = A_t s_(t−1) + noise,  z_t = h_t · s_t + noise of variance r_t

A Markov kernel gives it exactly, on any times (Särkkä and Solin 2019, "Applied Stochastic Differential Equations",
chapter 12). Inducing points give it approximately for any kernel: the state is what the process is at those points,
and never moves.

The Kalman filter in its innovations' form is the triangular factor of the covariance, so noise, samples and likelihoods
are those of the dense algebra. Both its recursions, of covariances and of states, are associative, and run as scans of
O(log T) parallel steps (Särkkä and García-Fernández 2021, arXiv 1905.13002) or in chunks.

    B batch, G groups of dimensions that share hyperparameters, T time, R dimensions in a group, S state
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from latentlm.distributions.algebra import Algebra, NotPositiveError, cut, of_groups
from latentlm.distributions.kernels import Kernel

_CHUNK = 16


class StateSpace(Algebra):
    """Kalman's algebra of a linear Gaussian model of a state.

    Args:
        transition: A_t; that of the first time is not used.
        added: covariance of what comes to the state at t; at the first time, of the state.
        readout: h_t.
        noise: r_t.
    """

    def __init__(
        self,
        transition: Float[Tensor, "shared T S S"],
        added: Float[Tensor, "shared T S S"],
        readout: Float[Tensor, "shared T S"],
        noise: Float[Tensor, "*B G T"],
    ):
        self.readout = readout
        predicted = _predicted_covariances(transition, added, readout, noise)
        seen = (predicted @ readout[..., None])[..., 0]
        variance = (readout * seen).sum(-1) + noise
        if not bool((variance > 0).all()):  # a NaN is not above 0, either
            raise NotPositiveError
        self.variance = variance
        # a_(t+1) = A_(t+1) (a_t + gain_t (z_t − h_t a_t)): the last one leads nowhere
        onwards = torch.cat((transition[..., 1:, :, :], torch.zeros_like(transition[..., :1, :, :])), -3)
        self.onwards = onwards
        self.gain = (onwards @ (seen / variance[..., None])[..., None])[..., 0]
        self.closed = onwards - self.gain[..., :, None] * readout[..., None, :]

    @classmethod
    def of_kernel(cls, kernel: Kernel, times: Float[Tensor, " T"], noise: Float[Tensor, "*B G T"]) -> "StateSpace":
        """Exact, for a Markov kernel."""
        groups = noise.shape[-2]
        stationary = of_groups(kernel.stationary(), groups)[:, None]
        transition = of_groups(kernel.transition(times.diff(prepend=times[:1])), groups)
        added = stationary - transition @ stationary @ transition.mT
        added = torch.cat((stationary.expand_as(added)[:, :1], added[:, 1:]), 1)
        transition = transition.expand_as(added)
        return cls(transition, added, kernel.readout().expand(*transition.shape[:-1]), noise)

    @classmethod
    def of_inducing(
        cls,
        kernel: Kernel,
        times: Float[Tensor, " T"],
        noise: Float[Tensor, "*B G T"],
        inducing: Float[Tensor, " S"],
    ) -> "StateSpace":
        """Approximate: z_t depends on other times through z at the inducing points alone, its own variance is kept.

        FITC (Snelson and Ghahramani 2006; Quiñonero-Candela and Rasmussen 2005, section 6). The state is z at the
        inducing points in whitened coordinates.
        """
        among = kernel(inducing[:, None] - inducing[None, :])
        factor, info = torch.linalg.cholesky_ex(
            among + 1e-10 * among.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(len(inducing)).to(among)
        )
        if not bool((info == 0).all()):
            raise NotPositiveError
        across = kernel(inducing[:, None] - times[None, :])
        readout = torch.linalg.solve_triangular(factor, across, upper=False).mT
        left_over = (kernel.variance()[:, None] - readout.square().sum(-1)).clamp_min(0.0)
        one = torch.eye(len(inducing)).to(among).expand(*readout.shape, -1)
        first = torch.zeros_like(one)
        first[:, 0] = one[:, 0]
        one, first, readout, left_over = (of_groups(x, noise.shape[-2]) for x in (one, first, readout, left_over))
        return cls(one, first, readout, noise + left_over)

    def whiten(self, values: Float[Tensor, "B G T R"]) -> Float[Tensor, "B G T R"]:
        scale = self.variance.sqrt()[..., None]
        return recurrence(self.closed, self.gain, -self.readout, values) / scale

    def color(self, noise: Float[Tensor, "B G T R"]) -> Float[Tensor, "B G T R"]:
        return recurrence(self.onwards, self.gain, self.readout, noise * self.variance.sqrt()[..., None])

    def steps(
        self, noise: Float[Tensor, "G rest columns"], prefix: Float[Tensor, "G begun columns"]
    ) -> Iterator[Float[Tensor, "G columns"]]:
        begun = prefix.shape[1]
        state = prefix.new_zeros(len(prefix), self.readout.shape[-1], prefix.shape[-1])
        closed, onwards = self.closed.detach().unbind(-3), self.onwards.detach().unbind(-3)
        gains, readouts = self.gain.detach()[..., None].unbind(-3), self.readout.detach()[..., None, :].unbind(-3)
        for t, value in enumerate(prefix[:, :, None].unbind(1)):
            state = closed[t] @ state + gains[t] * value
        innovations = self.variance.detach().sqrt()[:, begun : begun + noise.shape[1], None] * noise
        for t, innovation in enumerate(innovations[:, :, None].unbind(1), begun):
            yield torch.baddbmm(innovation, readouts[t].expand(len(state), -1, -1), state)[:, 0]
            state = torch.baddbmm(gains[t] * innovation, onwards[t].expand(len(state), -1, -1), state)

    def solve(self, values: Float[Tensor, "B G T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B G T R"]:
        # Σ⁻¹ = L⁻ᵀ L⁻¹, and L⁻ᵀ is L⁻¹ run backwards (de Jong 1989, "Smoothing and interpolation with the state-space
        # model"): of a row of its own length, with nothing after its end
        white = cut(self.whiten(cut(values, lengths)), lengths) / self.variance.sqrt()[..., None]
        backwards = recurrence(self.closed.mT.flip(-3), self.readout.flip(-2), -self.gain.flip(-2), white.flip(-2))
        return cut(backwards.flip(-2), lengths)

    def quadratic(self, values: Float[Tensor, "B G T R"], lengths: Int64[Tensor, " B"]) -> Float[Tensor, "B G R"]:
        if self.variance.dim() > 2:
            return super().quadratic(values, lengths)
        columns = cut(values, lengths).permute(1, 2, 0, 3)
        real = torch.arange(columns.shape[1], device=lengths.device)[:, None] < lengths
        white = recurrence(self.closed, self.gain, -self.readout, columns.flatten(2)[None])[0].view(columns.shape)
        weights = real / self.variance[..., None]
        return torch.einsum("gtbr,gtbr,gtb->bgr", white, white, weights)

    def log_determinant(self, lengths: Int64[Tensor, " N"]) -> Float[Tensor, "N G"]:
        logs = self.variance.log()
        return cut(logs.expand(len(lengths), *logs.shape[-2:])[..., None], lengths)[..., 0].sum(-1)

    def precision_diagonal(self, lengths: Int64[Tensor, " N"]) -> Float[Tensor, "N G T"]:
        weights = cut((1 / self.variance).expand(len(lengths), *self.variance.shape[-2:])[..., None], lengths)[..., 0]
        told = weights[..., None, None] * (self.readout[..., :, None] * self.readout[..., None, :])
        # N_(t−1) = told_t + closed_tᵀ N_t closed_t, from nothing at the end: the precision of what comes after t
        closed = self.closed.expand(told.shape)
        later = scan(
            lambda late, early: (late[0] @ early[0], early[1] + early[0].mT @ late[1] @ early[0]),
            (closed.flip(-3).movedim(-3, 0), told.flip(-3).movedim(-3, 0)),
        )[1]
        later = later.movedim(0, -3).flip(-3)
        later = torch.cat((later[..., 1:, :, :], torch.zeros_like(later[..., :1, :, :])), -3)
        diagonal = weights + (self.gain[..., None, :] @ later @ self.gain[..., :, None])[..., 0, 0]
        return cut(diagonal[..., None], lengths)[..., 0]


def _predicted_covariances(transition: Tensor, added: Tensor, readout: Tensor, noise: Tensor) -> Tensor:
    """Covariances of s_t given z_<t.

    The filter's step is an element (A, C, J), where J is what z_t says of the state before it, and two steps are one:
    Särkkä and García-Fernández 2021, equations 10 to 15.
    """
    seen = (added @ readout[..., None])[..., 0]
    variance = (readout * seen).sum(-1) + noise
    gain = seen / variance[..., None]
    shape = torch.broadcast_shapes(transition.shape, (*variance.shape, 1, 1))
    one = torch.eye(shape[-1], dtype=torch.float64, device=transition.device)
    kept = one - gain[..., :, None] * readout[..., None, :]
    said = (transition.mT @ readout[..., None])[..., 0]
    first = torch.zeros(shape[-3], dtype=torch.float64, device=transition.device)
    first[0] = 1.0
    later = (1 - first)[:, None, None]
    a = later * (kept @ transition)
    j = later * (said[..., :, None] * said[..., None, :] / variance[..., None, None])
    c = kept @ added

    def combined(early: tuple[Tensor, ...], late: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (a1, c1, j1), (a2, c2, j2) = early, late
        # both of (I + C₁ J₂)⁻¹ A₁ and (I + C₁ J₂)⁻¹ C₁
        solved = torch.linalg.solve(one + c1 @ j2, torch.cat((a1, c1), -1))
        through, covariance = solved[..., : len(one)], solved[..., len(one) :]
        c = a2 @ covariance @ a2.mT + c2
        j = a1.mT @ (j2 @ through) + j1
        return a2 @ through, 0.5 * (c + c.mT), 0.5 * (j + j.mT)

    elements = tuple(x.expand(shape).movedim(-3, 0) for x in (a, c, j))
    filtered = scan(combined, elements)[1].movedim(0, -3)
    before = torch.cat((torch.zeros_like(filtered[..., :1, :, :]), filtered[..., :-1, :, :]), -3)
    return transition @ before @ transition.mT + added


def scan(
    combined: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]], elements: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """All prefixes of an associative product along the first dimension: T steps of work, 2 log T one after another.

    Blelloch 1990, "Prefix sums and their applications".
    """
    length = len(elements[0])
    if length == 1:
        return elements
    even = tuple(x[0 : length - 1 : 2] for x in elements)
    odd = tuple(x[1::2] for x in elements)
    at_odd = scan(combined, combined(even, odd))
    later = tuple(x[2::2] for x in elements)
    outputs = []
    at_even = combined(tuple(x[: len(later[0])] for x in at_odd), later) if len(later[0]) else ()
    for place, (given, of_odd) in enumerate(zip(elements, at_odd, strict=True)):
        of_even = torch.cat((given[:1], at_even[place])) if at_even else given[:1]
        both = torch.stack((of_even[: len(of_odd)], of_odd), 1).flatten(0, 1)
        outputs.append(torch.cat((both, of_even[len(of_odd) :])))
    return tuple(outputs)


def recurrence(
    moves: Float[Tensor, "*rows_of_moves T S S"],
    takes: Float[Tensor, "*rows_of_takes T S"],
    gives: Float[Tensor, "*rows_of_gives T S"],
    inputs: Float[Tensor, "B G T R"],
) -> Float[Tensor, "B G T R"]:
    """y_t = gives_t · a_t + x_t with a_(t+1) = moves_t a_t + takes_t x_t from a_0 = 0, for each column of x.

    In chunks: what a chunk makes of its own inputs and of the state it begins with is a matrix, made for all chunks at
    once; then the states go from chunk to chunk.
    """
    *_, total, state = takes.shape
    if moves.dim() == inputs.dim() and len(inputs) > 1:  # one matrix for all rows: their columns stand side by side
        columns = inputs.permute(1, 2, 0, 3).flatten(2)[None]
        return recurrence(moves, takes, gives, columns)[0].unflatten(2, (len(inputs), -1)).permute(2, 0, 1, 3)
    if moves.dim() == inputs.dim() + 1 and inputs.shape[-1] < _CHUNK:  # a matrix for each column: more than the columns
        return _recurrence_by_scan(moves, takes, gives, inputs)
    chunks = -(-total // _CHUNK)
    missing = chunks * _CHUNK - total
    moves = torch.nn.functional.pad(moves, (0, 0, 0, 0, 0, missing)).unflatten(-3, (chunks, _CHUNK))
    takes, gives, x = (
        torch.nn.functional.pad(v, (0, 0, 0, missing)).unflatten(-2, (chunks, _CHUNK)) for v in (takes, gives, inputs)
    )
    # columns: the state that the chunk begins with, then its inputs
    reached = torch.eye(state, state + _CHUNK, dtype=inputs.dtype, device=inputs.device)
    reached = reached.expand(*takes.shape[:-2], state, state + _CHUNK)
    units = torch.eye(state + _CHUNK, dtype=inputs.dtype, device=inputs.device)[state:]
    responses = []
    # unbound, since the gradient of each of many slices would be as large as the whole
    for move, take, give, unit in zip(moves.unbind(-3), takes.unbind(-2), gives.unbind(-2), units, strict=True):
        responses.append((give[..., None, :] @ reached)[..., 0, :] + unit)
        reached = move @ reached + take[..., :, None] * unit
    response = torch.stack(responses, -2)
    driven = reached[..., state:] @ x
    states = [torch.zeros_like(driven[..., 0, :, :])]
    for through, arrives in zip(reached[..., :state].unbind(-3)[:-1], driven.unbind(-3)[:-1], strict=True):
        states.append(through @ states[-1] + arrives)
    begins = torch.stack(states, -3)
    outputs = response[..., state:] @ x + response[..., :state] @ begins
    return outputs.flatten(-3, -2)[..., :total, :]


def _recurrence_by_scan(moves: Tensor, takes: Tensor, gives: Tensor, inputs: Tensor) -> Tensor:
    driven = takes[..., None] * inputs[..., None, :]
    _, states = scan(
        lambda early, late: (late[0] @ early[0], late[0] @ early[1] + late[1]),
        (moves.movedim(-3, 0), driven.movedim(-3, 0)),
    )
    states = states.movedim(0, -3)
    before = torch.cat((torch.zeros_like(states[..., :1, :, :]), states[..., :-1, :, :]), -3)
    return (gives[..., None, :] @ before)[..., 0, :] + inputs
