"""Filters of all wavelet families by what defines them, and what WaveFT's config refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import peft
from peft.errors import ConfigError
from peft.ops import bases, wavelets

FAMILIES = [f for f in wavelets.FAMILIES if f != "coif4"]  # which Hugging Face PEFT has otherwise


def parts(family):
    """Name, size and low-pass filter of a family."""
    name = family.rstrip("0123456789")
    return name, int(family[len(name) :]), np.array(wavelets.filters(family)[0])


def polynomials(count, n):
    """Legendre polynomials on n points that lie evenly in [-1, 1], (count, n): moments without huge numbers."""
    return np.polynomial.legendre.legvander(np.linspace(-1, 1, n), count - 1).T


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filter_is_what_its_family_promises(family):
    name, size, low = parts(family)
    taps = {"db": 2, "sym": 2, "coif": 6}[name] * size
    assert len(low) == taps
    for shift in range(taps // 2):
        assert low[2 * shift :] @ low[: taps - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-12)
    moments = 2 * size if name == "coif" else size
    signs = (-1.0) ** np.arange(taps)
    assert np.abs(polynomials(moments, taps) @ (signs * low)).max() < 1e-12
    assert low.sum() == pytest.approx(2**0.5)
    if name == "coif":  # its low-pass filter acts on polynomials as a single tap does
        tap = np.eye(taps)[2 * size] * 2**0.5
        assert np.abs(polynomials(moments, taps) @ (low - tap)).max() < 1e-12


def test_the_wavelet_is_the_reversed_filter():
    for family in wavelets.FAMILIES:
        low, high = map(np.array, wavelets.filters(family))
        assert np.array_equal(high[::-1], low * (-1.0) ** (len(low) - 1 - np.arange(len(low))))


def bend(low):
    """How far a filter's phase is from linear, weighted by magnitude."""
    w = np.linspace(0, np.pi, 400)[:-1]
    H = np.exp(-1j * w[:, None] * np.arange(len(low))) @ low
    phase, weight = np.unwrap(np.angle(H)), np.abs(H) ** 2
    slope = (weight * w * phase).sum() / (weight * w * w).sum()
    return float((weight * (phase - slope * w) ** 2).sum())


@pytest.mark.parametrize("size", range(4, 21))
def test_a_symlet_is_a_daubechies_filter_of_straighter_phase(size):
    sym, db = parts(f"sym{size}")[2], parts(f"db{size}")[2]
    assert np.allclose(np.abs(np.fft.fft(sym, 256)), np.abs(np.fft.fft(db, 256)), atol=1e-12)
    assert bend(sym) < bend(db) / 2


# As published, to the digits that tell the choices of zeros apart.
FIRST = {"db3": 0.33267055, "db4": 0.23037781, "sym4": 0.03222310, "sym5": 0.01953888, "sym6": -0.00780071}
FIRST |= {"sym7": 0.01026818, "sym8": 0.00188995, "sym10": -0.00045933, "coif2": 0.01638734, "coif3": -0.00379351}


@pytest.mark.parametrize("family", FIRST)
def test_the_usual_one_of_several_solutions(family):
    assert parts(family)[2][0] == pytest.approx(FIRST[family], abs=1e-8)


@pytest.mark.parametrize("family", ["db1", "db9", "sym20", "coif17"])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 33])
def test_back_is_the_transpose_of_forward(family, n):
    basis = bases.wavelet(family)
    there = basis.forward(torch.eye(n, dtype=torch.float64))  # (rows, n)
    back = basis.back(torch.eye(basis.rows(n), dtype=torch.float64), n)  # (rows, n)
    torch.testing.assert_close(back, there)


@pytest.mark.parametrize("family", ["db38", "sym11", "coif5", "coif17"])
def test_families_that_upstream_only_lists_merge_like_any(family):
    torch.manual_seed(0)
    config = {"target_modules": ["0"], "wavelet_family": family, "init_weights": False}
    x = torch.randn(3, 40)
    for n in (10, 900):  # few enough to transform x, and not
        model = peft.get_peft_model(nn.Sequential(nn.Linear(40, 30)), peft.WaveFTConfig(n_frequency=n, **config))
        y, base = model(x), model.base_model.model[0].base_layer(x)
        model.merge_adapter()
        assert (y - base).abs().max() > 1e-3
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("wavelet_family", "db39", "db38"),
        ("wavelet_family", "haar", "db1"),
        ("n_frequency", 0, "n_frequency"),
        ("scaling", float("inf"), "scaling"),
        ("random_loc_seed", None, "random_loc_seed"),
        ("bias", "fourier_only", "bias"),
    ],
)
def test_wrong_values_name_the_field(field, value, message):
    with pytest.raises(ConfigError, match=message):
        peft.WaveFTConfig(**{field: value})


def test_more_coefficients_than_the_layer_has():
    with pytest.raises(ConfigError, match="which has 6"):
        peft.get_peft_model(nn.Sequential(nn.Linear(2, 3)), peft.WaveFTConfig(target_modules=["0"], n_frequency=7))


def test_a_pattern_beside_proportional_parameters_does_nothing_and_says_so():
    with pytest.warns(RuntimeWarning, match="n_frequency_pattern"):
        peft.WaveFTConfig(proportional_parameters=True, n_frequency_pattern={"a": 3})


def test_small_layers_get_a_coefficient_at_least():
    base = nn.ModuleDict({"small": nn.Linear(2, 3), "large": nn.Linear(64, 64)})
    config = peft.WaveFTConfig(target_modules=["small", "large"], n_frequency=5, proportional_parameters=True)
    layers = peft.get_peft_model(base, config).base_model.layers
    assert [len(layer.waveft_spectrum["default"]) for layer in layers.values()] == [1, 10]
