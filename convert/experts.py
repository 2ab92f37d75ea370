"""The table rows of mixture-of-experts layers, which LLaDA-MoE and LLaDA2 name almost alike."""

from jdllm.convert.table import Row
from jdllm.model.config import MoEConfig

PARTS = ("gate_proj", "up_proj", "down_proj")


def mlp_rows(name: str, source: str, letter: str = "F") -> list[Row]:
    """Returns the table rows of a SwiGLU feed-forward; `letter` is its width."""
    gate, up, down = (f"{source}.{part}.weight" for part in PARTS)
    return [
        Row(f"{name}.gate_up", (gate, up), f"{letter}D->DC{letter}"),
        Row(f"{name}.down", (down,), f"D{letter}->{letter}D"),
    ]


def merged_rows(name: str, source: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Returns rows of gate and up, and of down, for files with all experts of a layer merged.

    dFactory trains on gate, up and down apart; dInfer fuses gate over up as w1, and calls down w2.
    """
    gate, up, down = (f"{source}.experts.{part}" for part in PARTS)
    return (
        (
            Row(f"{name}.gate_up", (gate, up), "EMD->EDCM"),
            Row(f"{name}.gate_up", (f"{source}.w1",), "E(PM)D->EDPM"),
        ),
        (
            Row(f"{name}.down", (down,), "EDM->EMD"),
            Row(f"{name}.down", (f"{source}.w2",), "EDM->EMD"),
        ),
    )


def expert_rows(name: str, source: str, bias: str, shared: str, moe: MoEConfig) -> list[Row]:
    """Returns the rows of the layer `name`, router to shared expert, with its mlp at `source`.

    `bias` and `shared` are where its expert bias and its shared expert stand, if it has them. The
    bias is always exported in float32; the router as it was stored.
    """
    table = [
        Row(
            f"{name}.experts.router",
            (f"{source}.gate.weight",),
            "ED->DE",
            dtype="float32",
            stored=moe.router_stored,
        )
    ]
    if moe.expert_bias != "none":
        table.append(Row(f"{name}.experts.bias", (bias,), "E->E", dtype="float32"))
    each = [[f"{source}.experts.{e}.{part}.weight" for part in PARTS] for e in range(moe.experts)]
    pairs = tuple(tensor for gate, up, _ in each for tensor in (gate, up))
    downs = tuple(down for _, _, down in each)
    merged_up, merged_down = merged_rows(f"{name}.experts", source)
    table.append(Row(f"{name}.experts.gate_up", pairs, "MD->EDCM", instead=merged_up))
    table.append(Row(f"{name}.experts.down", downs, "DM->EMD", instead=merged_down))
    if moe.shared_mlp:
        table += mlp_rows(f"{name}.shared", shared, "U")
    return table
