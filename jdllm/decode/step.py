"""One model call for some rows, each at its own block; then the rule, then the stops.

The step does not know who drives it: a driver says which rows take part, and in which kind of call.
"""

import dataclasses

import jax.numpy as jnp

from jdllm.decode.feed import smoothed
from jdllm.decode.layout import put
from jdllm.decode.look import Call, Seen, look_at, shown, stop_view
from jdllm.decode.rows import Rows, keep
from jdllm.decode.setup import Setup
from jdllm.model.cache import Cache
from jdllm.model.model import Model
from jdllm.unmask import Decision


def block_step(
    model: Model, setup: Setup, rows: Rows, cache: Cache | None, call: Call
) -> tuple[Rows, Cache | None, Seen, Decision]:
    """The rows after one model call, the cache, and what was seen and decided on the way.

    Rows that are not active stay as they are, but for their keys in the cache.
    """
    seen, cache = look_at(model, setup, rows, cache, call)
    decision, memory = setup.unmask(seen.view, rows.unmask)
    after = rows.written(seen.columns_BN, decision, memory, call.active_B)
    view = stop_view(after, opening=call.full and setup.plan.refreshes)
    nothing_BT = jnp.full_like(rows.tokens, -1)
    view = dataclasses.replace(
        view,
        candidates_BT=put(nothing_BT, decision.candidate_BN, seen.columns_BN),
        written_BT=after.tokens != rows.tokens,
        look=shown(setup, rows, seen, call, (model.config.mask_id,)),
    )
    after = after.judged(setup.stop(view, rows.stop), call.active_B)
    if setup.smooth:
        inputs = smoothed(model, setup, rows, after, seen.window_BW, seen.hidden_BWD)
        after = dataclasses.replace(after, inputs=keep(call.active_B, inputs, rows.inputs))
    return after, cache, seen, decision
