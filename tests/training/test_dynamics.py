"""Gradient dynamics: recorded moments and maps, windows, and that they cost next to nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdllm.model.lora import Factors
from jdllm.train.dynamics import (
    STATISTICS,
    WINDOWS,
    Dynamics,
    described,
    flattened,
    statistics,
)
from tests.support.edit_goldens import recorded

RUNS = ("moments_fp32_1rank", "moments_bf16_1rank", "moments_fp32_2ranks")


def updates(run: dict[str, np.ndarray]) -> int:
    return max(int(k.split("/")[2][1:]) for k in run if k.startswith("exp_avg/"))


def ranks(run: dict[str, np.ndarray]) -> int:
    return len({k.split("/")[1] for k in run if k.startswith("exp_avg/")})


def b_names(run: dict[str, np.ndarray]) -> list[str]:
    return [name for name in run["names"].tolist() if "lora_B" in name]


def factors(b_FR: dict[str, np.ndarray], dtype: Any = jnp.float32) -> dict[str, Factors]:
    """Recorded arrays, in PEFT's layout, where the B of modules of such names stand."""
    return {
        name: Factors(jnp.zeros((1, b.shape[1]), dtype), jnp.asarray(b.T, dtype), 1.0)
        for name, b in b_FR.items()
    }


def moments(run: dict[str, np.ndarray], rank: int, t: int, dtype: Any = jnp.float32) -> Any:
    mu, nu = (
        factors({name: run[f"{kind}/r{rank}/t{t}/{name}"] for name in b_names(run)}, dtype)
        for kind in ("exp_avg", "exp_avg_sq")
    )
    return optax.ScaleByAdamState(jnp.array(t), mu, nu)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", RUNS)
def test_dynamics_of_recorded_moments_are_the_recorded_maps(name: str):
    """Over all updates, over the first four, and over all but the last, as its files are named."""
    run, eps = recorded(name), float(recorded(name)["eps"])
    names, T, step = b_names(run), updates(run), jax.jit(Dynamics.updated)
    assert names and run["names"].shape == (8,)
    means = []
    for rank in range(ranks(run)):
        state, kept = (
            Dynamics.of(factors({n: run[f"param0/r{rank}/{n}"] for n in names}), T, eps),
            {},
        )
        for t in range(1, T + 1):
            state = step(state, moments(run, rank, t))
            kept[t] = flattened(state.maps()["mean"])
        means.append(kept)
    for title, t in (("map_all", T), ("map_steps1to4", 4), ("map_ckptT", T - 1)):
        for module in names:
            mean = np.mean([kept[t][module] for kept in means], axis=0)
            wanted = run.get(f"{title}/{module}")
            if wanted is not None:
                np.testing.assert_allclose(mean, wanted, rtol=2e-6, atol=5e-7)
    for module in names:
        np.testing.assert_allclose(means[0][T][module], run[f"map_rank0/{module}"], rtol=2e-6,
                                   atol=5e-7)  # fmt: skip


def test_dynamics_of_recorded_gradients_are_the_recorded_maps():
    """optax's moments are the reference's, and so are the maps."""
    run = recorded("moments_fp32_1rank")
    names, T, eps = b_names(run), updates(run), float(run["eps"])
    b1, b2 = (float(x) for x in run["betas"])
    adam = optax.scale_by_adam(b1, b2, eps)
    trained = factors({n: run[f"param0/r0/{n}"] for n in names})
    state, optimiser = Dynamics.of(trained, T, eps), adam.init(trained)  # pyright: ignore
    for t in range(1, T + 1):
        gradient = factors({n: run[f"grad/r0/t{t}/{n}"] for n in names})
        _, optimiser = adam.update(gradient, optimiser)  # pyright: ignore
        state = state.updated(optimiser)
    for name, mine in flattened(state.maps()["mean"]).items():
        np.testing.assert_allclose(mine, run[f"map_all/{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [(RUNS[0], "float32"), (RUNS[1], "bfloat16")])
def test_dynamics_statistics_are_the_recorded_ones(name: str, dtype: str):
    """In bfloat16 every intermediate is rounded, as the reference rounds it: then bit for bit."""
    run, eps = recorded(name), float(recorded(name)["eps"])
    assert run["stat_names"].tolist() == list(STATISTICS)
    for t in range(1, updates(run) + 1):
        for number, module in enumerate(run["names"].tolist()):
            m, v = (
                jnp.asarray(run[f"{kind}/r0/t{t}/{module}"], dtype)
                for kind in ("exp_avg", "exp_avg_sq")
            )
            mine = statistics(m, v, eps).astype(jnp.float32)
            theirs = run["stats_rank0"][t - 1, number]
            exact = dtype == "bfloat16"
            np.testing.assert_allclose(
                mine, theirs, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-7
            )


def test_dynamics_statistics_by_module():
    run = recorded("moments_fp32_1rank")
    found = described(moments(run, 0, 3), float(run["eps"]))
    for number, name in enumerate(run["names"].tolist()):
        if "lora_B" in name:
            theirs = run["stats_rank0"][2, number]
            np.testing.assert_allclose(found[name], theirs, rtol=1e-5, atol=1e-7)


def test_dynamics_windows_by_hand():
    """Ten updates of 1, 2, ..., 10: the whole run, its last tenth, and a moving average."""
    state = Dynamics.of(factors({"a": np.zeros((2, 1))}), 10, 0.0)
    for t in range(1, 11):
        mu = factors({"a": np.full((2, 1), float(t))})
        nu = factors({"a": np.full((2, 1), 4.0)})
        state = state.updated(optax.ScaleByAdamState(jnp.array(t), mu, nu))  # pyright: ignore
    maps = {name: float(own["a"][0, 0]) for name, own in state.maps().items()}
    decay = WINDOWS["ema"].keep ** np.arange(9, -1, -1)
    moving = (decay * np.arange(1, 11)).sum() / decay.sum() / 2
    assert maps == pytest.approx({"mean": 2.75, "late": 5.0, "ema": moving, "momentum": 5.5})


def test_dynamics_need_factors():
    with pytest.raises(ValueError, match="set lora.rank="):
        Dynamics.of({"w": jnp.zeros(3)}, 10, 1e-8)
