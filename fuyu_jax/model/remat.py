"""What is kept of a layer for the backward pass, by named policy; the rest is computed again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from fuyu_jax.model.blockwise import SAVED
from fuyu_jax.parallel.fsdp import GATHERED

_KEPT = ("qkv", SAVED)
_INPUT = "layer_input"


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Everything, but no device keeps all layers' gathered parameters."""
    return primitive.name != "all_gather" and params.get("name") != GATHERED


def rematerialise(
    step: Callable[..., Any], policy: str, gathers: bool = False
) -> Callable[..., Any]:
    """`step(x, inputs)` of a scan over layers, keeping what the policy says.

    Args:
      step: one layer.
      gathers: whether it gathers its parameters, which are then gathered again.
      policy: "none" computes nothing again; "full" keeps a layer's input; "minimal" that, queries,
        keys, values and attention's output, so that no attention is computed twice; "offload" the
        same, in the host's memory.
    """
    policies = jax.checkpoint_policies
    if policy == "none" and not gathers:
        return step  # a checkpoint that keeps all costs a tenth of a CPU's step
    if policy == "none":
        chosen = _all_but_gathered
    elif policy == "full":
        chosen = policies.nothing_saveable
    elif policy == "minimal":
        chosen = policies.save_only_these_names(*_KEPT)
    else:
        chosen = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[_INPUT, *_KEPT],
            offload_src="device",
            offload_dst="pinned_host",
        )

        def named(x: Any, inputs: Any) -> Any:
            return step(jax.tree.map(lambda a: checkpoint_name(a, _INPUT), x), inputs)

        return jax.checkpoint(named, prevent_cse=False, policy=chosen)
    return jax.checkpoint(step, prevent_cse=False, policy=chosen)
