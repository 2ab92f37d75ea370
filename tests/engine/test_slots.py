"""Slots: probabilities are those of a plain forward pass, fillings are among what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdllm.engine.slots import Around, choose, complete
from jdllm.model.model import forward
from tests.support.tiny_models import TINY, tiny

AROUND = Around([3, 9, 27, 17], [5, 40])


@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_choices_have_their_probabilities(kind: str):
    model, choices = tiny(kind).model, [[7], [8, 9], [8, 50]]
    sums = []
    for choice in choices:
        row = [*AROUND.before, *[TINY.mask_id] * len(choice), *AROUND.behind]
        logits = forward(model, jnp.array([row]), jnp.ones((1, len(row)), bool))[0]
        logits = logits.at[:, TINY.mask_id].set(-jnp.inf)
        at = len(AROUND.before) + np.arange(len(choice)) - (kind == "shifted")
        sums.append(float(jax.nn.log_softmax(logits)[at, np.array(choice)].sum()))
    wanted = np.exp(sums) / np.exp(sums).sum()
    np.testing.assert_allclose(choose(model, AROUND, choices), wanted, rtol=2e-4)


def test_a_filling_is_among_what_is_allowed():
    allowed = np.zeros((5, TINY.vocab), bool)
    allowed[:, [4, 11, 30]] = True
    allowed[2] = np.arange(TINY.vocab) == 12
    ids, calls = complete(tiny("plain").model, AROUND, allowed)
    assert ids[2] == 12 and set(ids) - {12} <= {4, 11, 30}
    assert 1 <= calls <= 5
