"""Rows with noise of their own against explicit linear algebra of each row's leading block, in float64."""

import pytest
import torch
from torch.autograd import gradcheck

from latentlm.distributions import RBF, GaussianProcess, Matern
from latentlm.distributions.algebra import NotPositiveError
from latentlm.distributions.row_algebra import DenseRows
from latentlm.errors import DivergedError

T, DIM, COLUMNS = 9, 4, 3
LENGTHS = torch.tensor([T, 5, 1, 0])
KERNELS = {
    "one group": lambda: RBF(2.0, 1.3),
    "two groups of two": lambda: Matern(1.5, [2.0, 5.0], [1.0, 2.0]),
    "a group for each": lambda: Matern(2.5, [1.0, 2.0, 4.0, 8.0]) + RBF(3.0, [0.3, 0.5, 1.0, 2.0]),
}
EACH_KERNEL = pytest.mark.parametrize("name", KERNELS)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def setting(name="two groups of two", lengths=LENGTHS, total=T):
    """A kernel, times with a gap, noise [B, DIM, T] between 0.1 and about 1, and right-hand sides."""
    kernel, times = KERNELS[name]().double(), torch.arange(total).double()
    times[total // 2 :] += 0.7
    noise = (0.1 + randn(len(lengths), DIM, total, seed=1).square()).requires_grad_()
    return kernel, times, noise, randn(len(lengths), DIM, total, COLUMNS, seed=2).requires_grad_()


def figures(kernel, times, noise, columns, lengths):
    algebra = DenseRows(kernel, times, noise, lengths)
    return {
        "solve": algebra.solve(columns, lengths),
        "log_determinant": algebra.log_determinant(lengths),
        "precision_diagonal": algebra.precision_diagonal(lengths),
    }


def explicit(kernel, times, noise, columns, lengths):
    """The same by torch.linalg of one leading block after the other."""
    whole = kernel(times[:, None] - times[None, :])
    whole = whole.repeat_interleave(DIM // len(whole), 0)
    solved, determinants, diagonals = [], [], []
    for row, n in enumerate(lengths.tolist()):
        block = whole[:, :n, :n] + torch.diag_embed(noise[row, :, :n])
        after = len(times) - n
        solved.append(torch.nn.functional.pad(torch.linalg.solve(block, columns[row, :, :n]), (0, 0, 0, after)))
        determinants.append(torch.linalg.slogdet(block).logabsdet)
        diagonals.append(torch.nn.functional.pad(torch.linalg.inv(block).diagonal(dim1=-2, dim2=-1), (0, after)))
    return {
        "solve": torch.stack(solved),
        "log_determinant": torch.stack(determinants),
        "precision_diagonal": torch.stack(diagonals),
    }


def assert_the_same(lengths, name="two groups of two", total=T):
    """Each figure to 1e-10, and its gradient in noise, columns and the kernel's hyperparameters to 1e-8."""
    kernel, times, noise, columns = setting(name, lengths, total)
    parameters = [noise, columns, *kernel.parameters()]
    mine, theirs = (of(kernel, times, noise, columns, lengths) for of in (figures, explicit))
    for figure, value in mine.items():
        torch.testing.assert_close(value, theirs[figure], rtol=1e-10, atol=1e-12)
        weight = randn(*value.shape, seed=3)
        own, other = (
            torch.autograd.grad((x * weight).sum(), parameters, retain_graph=True, allow_unused=True)
            for x in (value, theirs[figure])
        )
        for parameter, g, expected in zip(parameters, own, other, strict=True):
            zeros = torch.zeros_like(parameter)
            g, expected = (zeros if x is None else x for x in (g, expected))
            torch.testing.assert_close(g, expected, rtol=1e-8, atol=1e-9, msg=lambda m, f=figure: f"{f}: {m}")


@EACH_KERNEL
@pytest.mark.parametrize("lengths", [[T, T, T], [T, 5, 1, 0]], ids=["whole", "ragged"])
def test_rows_are_their_leading_blocks_with_gradients(name, lengths):
    assert_the_same(torch.tensor(lengths), name)


@pytest.mark.parametrize(
    ("lengths", "total"),
    [([T], T), ([3], T), ([1], 1), ([0], T), ([0, 0], T), ([0, 0], 0), ([T - 1, T, 2, T, 1], T)],
    ids=["one row", "one short row", "one number", "no numbers", "no numbers twice", "no times", "five rows"],
)
def test_rows_of_any_number_and_length(lengths, total):
    assert_the_same(torch.tensor(lengths), total=total)


@EACH_KERNEL
@pytest.mark.parametrize("figure", ["solve", "log_determinant", "precision_diagonal"])
def test_gradients_by_finite_differences(name, figure):
    lengths, total = torch.tensor([4, 2]), 4
    kernel, times, noise, columns = setting(name, lengths, total)

    def function(*_):  # the same tensors, in which gradcheck changes one number after another
        return figures(kernel, times, noise, columns, lengths)[figure]

    assert gradcheck(function, (noise, columns, *kernel.parameters()))


def test_what_stands_after_a_rows_end_changes_nothing_and_gets_no_gradient():
    lengths = LENGTHS
    kernel, times, noise, columns = setting()
    other_noise, other_columns = noise.detach().clone(), columns.detach().clone()
    for row, n in enumerate(lengths.tolist()):
        other_noise[row, :, n:], other_columns[row, :, n:] = 1e6, -1e3
    first, second = (
        figures(kernel, times, noise, columns, lengths),
        figures(kernel, times, other_noise, other_columns, lengths),
    )
    for figure, value in first.items():
        assert torch.equal(value, second[figure])
    total = sum((randn(*value.shape, seed=4) * value).sum() for value in first.values())
    for gradient in torch.autograd.grad(total, (noise, columns)):
        for row, n in enumerate(lengths.tolist()):
            assert bool((gradient[row, :, n:] == 0).all()) and bool((gradient[row, :, :n] != 0).all())


def test_rows_do_not_touch_one_another():
    kernel, times, noise, columns = setting()
    together = figures(kernel, times, noise, columns, LENGTHS)
    for row in range(len(LENGTHS)):
        part = slice(row, row + 1)
        alone = figures(kernel, times, noise[part], columns[part], LENGTHS[part])
        for figure, value in alone.items():
            torch.testing.assert_close(value, together[figure][part], rtol=1e-12, atol=1e-13)


def test_nothing_is_asked_of_a_kernel_that_is_held():
    """Of a kernel without gradient the noise still has its own."""
    kernel, times, noise, columns = setting()
    expected = torch.autograd.grad(figures(kernel, times, noise, columns, LENGTHS)["log_determinant"].sum(), noise)
    kernel.requires_grad_(False)
    found = torch.autograd.grad(figures(kernel, times, noise, columns, LENGTHS)["log_determinant"].sum(), noise)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("row", [0, 1])
def test_an_impossible_covariance_is_not_positive(row):
    kernel, times, noise, _ = setting(lengths=torch.tensor([T, 5]))
    impossible = noise.detach().clone()
    impossible[row, 2, 4] = -5.0
    with pytest.raises(NotPositiveError):
        DenseRows(kernel, times, impossible, torch.tensor([T, 5]))
    # after a row's end no noise is impossible
    DenseRows(kernel, times, impossible, torch.tensor([4, 4]))


def test_a_covariance_of_no_number_is_not_positive():
    kernel, times, noise, _ = setting()
    impossible = noise.detach().clone()
    impossible[0, 0, 0] = torch.nan
    with pytest.raises(NotPositiveError):
        DenseRows(kernel, times, impossible, LENGTHS)


@pytest.mark.parametrize("algebra", ["dense", "toeplitz"])
def test_a_process_with_noise_of_each_row_takes_them(algebra):
    kernel, _, noise, columns = setting()
    process = GaussianProcess(kernel, torch.arange(T).double(), DIM, 0.0, algebra, lengths=LENGTHS)
    found = process.with_noise(noise)
    assert isinstance(found, DenseRows)
    expected = explicit(kernel, process.times, noise, columns, LENGTHS)
    torch.testing.assert_close(found.solve(columns, LENGTHS), expected["solve"], rtol=1e-10, atol=1e-12)


def test_a_process_says_which_covariance_is_impossible():
    kernel, times, noise, _ = setting("one group")
    process = GaussianProcess(kernel, times, DIM, 0.0, "dense", lengths=LENGTHS)
    with pytest.raises(DivergedError, match="is not positive definite in float64"):
        process.with_noise(noise.detach() - 5.0)
    # what misses less than a millionth of the variance is lifted
    none = torch.zeros_like(noise)
    smooth = GaussianProcess(RBF(50.0).double(), times, DIM, 0.0, "dense", lengths=LENGTHS)
    assert bool(smooth.with_noise(none).log_determinant(LENGTHS).isfinite().all())
