"""What to change first, from a report on a compiled step."""

import math
from typing import Any

from fuyu_jax.config import TrainConfig


def advise(config: TrainConfig, found: dict[str, Any]) -> list[str]:
    """Three things, the most pressing first: what does not fit, then what costs most time."""
    tips = _memory(config, found)
    if "seconds" in found:
        tips += sorted(_time(config, found), reverse=True)
    tips += _memory_spare(config, found)
    tips.sort(key=lambda tip: -tip[0])
    return [text for _, text in tips[:3]]


def _memory(config: TrainConfig, found: dict[str, Any]) -> list[tuple[float, str]]:
    parts, hbm = found["bytes_per_device"], found["hbm_bytes_per_device"]
    spare = parts.get("spare", -1.0)
    if spare >= 0.05:
        return []
    tips = []
    mesh = found["mesh"]
    rows = config.rows_per_batch // (mesh["data"] * mesh["fsdp"])
    state = parts["params"] + parts["optimizer"]
    if config.model.remat in ("none", "minimal"):
        tips.append((1e3, 'model.remat="full": keep a layer\'s input alone'))
    if rows > 1:
        tips.append(
            (
                9e2,
                f"rows_per_batch={config.rows_per_batch // 2} with grad_accum="
                f"{config.grad_accum * 2}: half of the activations ({rows} rows a device now)",
            )
        )
    if state > hbm / 4 and mesh["data"] > 1:
        tips.append(
            (
                1.1e3 if state > hbm / 2 else 8e2,
                f"mesh.fsdp={mesh['fsdp'] * mesh['data']}: parameters and optimizer take "
                f"{state / 2**30:.1f} GiB of each device",
            )
        )
    tips.append((7e2, f"mesh.tensor={mesh['tensor'] * 2}: half of every activation and matrix"))
    tips.append((6e2, 'optim.name="adafactor", or optim.moment_dtype="bfloat16": smaller moments'))
    return tips


def _time(config: TrainConfig, found: dict[str, Any]) -> list[tuple[float, str]]:
    """(seconds of a step that it may save, what)."""
    seconds, mesh = found["seconds"], found["mesh"]
    tips = []
    sent = [c for c in found["largest_collectives"] if c["kind"] == "all-reduce" and c["in_loop"]]
    doubled = sum(c["bytes"] * c["times"] for c in sent)
    if doubled > 1e9:
        share = doubled / max(sum(k["wire_bytes"] for k in found["collectives"].values()), 1)
        group = max(c["devices"] for c in sent)
        near = 2 ** (int(math.log2(max(group, 2))) // 2 + 1)
        tips.append(
            (
                seconds["interconnect"] * share,
                f"mesh.fsdp={near}: {doubled / 1e9:.1f} GB of weights go through all-reduces over "
                f"{group} devices, at twice the bytes of gathers and scatters",
            )
        )
    compute = seconds["compute"]
    if seconds["interconnect"] > 0.5 * compute:
        rows = config.rows_per_batch
        tips.append(
            (
                seconds["interconnect"] / 2,
                f"rows_per_batch={rows * 2}: the interconnect's {seconds['interconnect']:.2f} s "
                f"are much beside {compute:.2f} s of compute, and do not grow with the rows",
            )
        )
    useful = found["model_flops_per_step"] / found["devices"]
    kernels = found["attention_kernel_flops_per_device"]
    flops = found["computed_flops_per_device"]
    masked = kernels * (1 - found["assumed"]["segment_tokens"] / found["assumed"]["tokens_per_row"])
    if kernels > 0.02 * flops:
        tips.append(
            (
                compute * masked / flops,
                f"data.tokens_per_row={found['assumed']['tokens_per_row'] // 2} and twice as many "
                f"rows: splash attention takes {kernels / flops:.0%} of the compute, most of it on "
                "pairs of other segments",
            )
        )
    again = max(flops - useful - masked, 0)
    if config.model.remat != "none" and again > 0.02 * flops:
        keep = "minimal" if config.model.remat in ("full", "offload") else "none"
        tips.append(
            (
                compute * again / flops * (0.5 if keep == "minimal" else 1),
                f'model.remat="{keep}" where memory allows: {again / flops:.0%} of the compute is '
                "done twice",
            )
        )
    if mesh["tensor"] > 1:
        tips.append(
            (
                0.1 * compute,
                "mesh.tensor=1: tensor parallelism sends activations in every layer, and fsdp none",
            )
        )
    return tips


def _memory_spare(config: TrainConfig, found: dict[str, Any]) -> list[tuple[float, str]]:
    """Of little weight: what is left to say where all is well."""
    spare = found["bytes_per_device"].get("spare", -1.0)
    rows = config.rows_per_batch
    tips = [
        (1e-6, "longer measured runs on the machine itself: --profile_steps=10:13 shows the rest"),
        (1e-7, 'optim.moment_dtype="bfloat16": a smaller first moment'),
    ]
    if spare > 0.4:
        tips.append(
            (
                1e-3,
                f"rows_per_batch={rows * 2}: {spare:.0%} of the memory is free, and the gathers "
                "cost the same",
            )
        )
    tips.append((1e-5, f"grad_accum={config.grad_accum * 2} with half the rows: less memory"))
    return tips
