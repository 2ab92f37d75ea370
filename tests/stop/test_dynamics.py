"""EDIT's numbers: cosines and divergences of recorded checks, and what has no recording."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.stop.dynamics import (
    Aim,
    Drift,
    aim_at,
    block_temperature,
    cosines,
    drift_of_directions,
    drift_of_tokens,
    row_energy,
)
from jdllm.stop.rule import Look
from tests.support.edit_goldens import recorded
from tests.support.one_row import stop_view

CHECK = recorded("kl_check")
NAMES = CHECK["modules"].tolist()
TEMPERATURES = ("0.1", "1.0", "2.0")
BLOCK = int(CHECK["block_start"]), int(CHECK["block_end"])


@pytest.fixture(scope="module")
def aims() -> dict[str, Aim]:
    return {name: aim_at(jnp.asarray(CHECK[f"map/{name}"])) for name in NAMES}


def activations(step: int) -> dict[str, jax.Array]:
    return {name: jnp.asarray(CHECK[f"act/t{step}/{name}"]) for name in NAMES}


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dynamics_replay_the_recorded_checks(temperature: str, aims: dict[str, Aim]):
    """Through the signal as the loop calls it: value per step, and what is below a threshold."""
    width = BLOCK[1] - BLOCK[0]
    signal = Drift(width, False, float(temperature), False, tuple(NAMES), 6)
    length, prompt = CHECK["mask/t0"].shape[1], int(CHECK["prompt_length"])
    tokens = [0] * length
    memory, values = signal.start(jnp.zeros((1, length), jnp.int32)), []
    for step in range(7):
        settled = ~CHECK[f"mask/t{step}"] & (np.arange(length) >= prompt)
        look = Look(
            settled_BT=jnp.asarray(settled), opened_B=jnp.array([width]), block_B=jnp.array([0]),
            steps_B=jnp.array([9]), due_B=jnp.array([-1]), probes=activations(step),
            window_BW=jnp.arange(length)[None], aims=aims,
        )  # fmt: skip
        view = stop_view(tokens, prompt, BLOCK, step_B=jnp.array([step + 1]), look=look)
        value_B, memory = signal.measure(view, memory)
        values.append(float(value_B[0]))
        for name, below in CHECK.items():
            if name.startswith(f"below/temp{temperature}/th"):
                bar = jnp.array([float(name.rpartition("th")[2])])
                assert bool(signal.calm(value_B, bar, view)[0]) == below[step], (name, step)
    np.testing.assert_allclose(values, CHECK[f"kl/temp{temperature}"], rtol=1e-4, atol=1e-6)


def test_dynamics_cosines_are_the_recorded_ones(aims: dict[str, Aim]):
    """Also of a zero activation, and with a map's column of zeros."""
    prompt, length = int(CHECK["prompt_length"]), CHECK["mask/t0"].shape[1]
    columns = np.arange(length)
    compared = 0
    for step in range(1, 7):
        visible = ~CHECK[f"mask/t{step}"][0] & (columns >= BLOCK[0]) & (columns < BLOCK[1])
        for name in NAMES:
            mine = cosines(activations(step)[name][0], aims[name])
            theirs = CHECK[f"derived_cos_cur/t{step}/{name}"]
            wanted = np.where(visible[prompt:, None], mine[prompt:], 0.0)
            np.testing.assert_allclose(wanted, theirs, atol=1e-5)
            compared += int(visible.sum())
    assert compared > 30


def test_dynamics_of_the_modules_and_tokens(aims: dict[str, Aim]):
    visible_N = ~CHECK["mask/t4"][0]
    visible_N &= (np.arange(len(visible_N)) >= BLOCK[0]) & (np.arange(len(visible_N)) < BLOCK[1])
    for number, name in enumerate(NAMES):
        now, before = (cosines(activations(t)[name][0], aims[name])[:, None] for t in (4, 3))
        value = drift_of_directions(now, before, jnp.asarray(visible_N), jnp.array(0.1))
        theirs = CHECK["derived_kl_modules/temp0.1/t4"][number]
        np.testing.assert_allclose(value, theirs, rtol=1e-4, atol=1e-6)


def test_dynamics_temperature_follows_the_masks_at_the_start():
    for name, value in recorded("schedules").items():
        if name.startswith("dyn_temperature"):
            masks = int(name.partition("visible_false")[2].partition("_")[0])
            assert float(block_temperature(jnp.array(masks / 64))) == pytest.approx(float(value))


def test_dynamics_read_small_features_as_large_activations(aims: dict[str, Aim]):
    """Cosines of B A x from x A alone: inner products of B's columns are all that it takes."""
    rng = np.random.default_rng(0)
    for width in (6, 1):
        map_FR, b_FK = rng.normal(size=(12, width)), rng.normal(size=(12, 6))
        z = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32).at[3].set(0)
        map_FR, b_FK = jnp.asarray(map_FR, jnp.float32), jnp.asarray(b_FK, jnp.float32)
        small, large = cosines(z, aim_at(map_FR, b_FK)), cosines(z @ b_FK.T, aim_at(map_FR))
        np.testing.assert_allclose(small, large, atol=1e-5)
        assert not np.any(small[3])


@pytest.mark.parametrize(
    ("kind", "wanted"), [("l2", [5.0, 1.0]), ("l1", [7.0, 1.0]), ("squared", [25.0, 1.0])]
)
def test_dynamics_row_energy(kind, wanted: list[float]):
    assert row_energy(jnp.array([[3.0, -4.0], [0.0, 1.0]]), kind).tolist() == wanted


def test_dynamics_of_tokens_by_hand():
    """KL(before || now) of two softmaxes over the tokens that are visible at both steps."""
    now, before = np.array([[0.2], [0.9], [0.4]]), np.array([[0.8], [-0.9], [0.1]])
    visible = jnp.array([True, False, True])

    def spread(x):
        e = np.exp(x[[0, 2], 0] / 0.5)
        return e / e.sum()

    p, q = spread(before), spread(now)
    heat = jnp.array(0.5)
    value = drift_of_tokens(jnp.asarray(now), jnp.asarray(before), visible, heat)
    assert float(value) == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-6)
    same = drift_of_tokens(jnp.asarray(now), jnp.asarray(now), visible, heat)
    nothing = drift_of_tokens(jnp.asarray(now), jnp.asarray(before), visible & False, heat)
    assert float(same) == 0 and float(nothing) == 0
