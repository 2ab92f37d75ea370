"""ModelConfig: every fact about a model, as data. And the table of named real configurations."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from jdllm.runtime.fields import check_fields, read

FORMAT = "jdllm-1"
NO_ID = -1
DTYPES = ("float32", "bfloat16", "float16")  # of stored weights


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The facts of a model's mixture-of-experts layers; `jdllm.kernels.routing` follows them."""

    experts: int
    top_k: int
    """Experts of a token."""
    expert_mlp: int
    """Width of one expert."""
    shared_mlp: int = 0
    """Width of the expert that every token uses besides, unweighted; 0 is none."""
    dense_layers: tuple[int, ...] = ()
    """Layers, from 0, that have an ordinary MLP instead."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores of the router's logits, over all experts."""
    renormalise: bool = False
    """Whether the weights of a token's experts are divided by their sum."""
    scale: float = 1.0
    """Factor of all weights."""
    groups: int = 1
    """The experts fall into this many groups of neighbours."""
    top_groups: int = 1
    """Only the best groups, by the sum of their two best scores, are chosen from."""
    expert_bias: Literal["none", "selection", "score"] = "none"
    """Where a learned bias per expert is added: it only helps to select, or counts as score."""
    router_stored: str = "float32"
    """Dtype of the routers in the Hugging Face files (here: float32). Only exporting reads it."""

    def __post_init__(self):
        check_fields(self, "moe.", least={"shared_mlp": 0, "dense_layers": 0})
        counts = {
            name: getattr(self, name) for name in ("experts", "top_k", "groups", "top_groups")
        }
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"experts must fall into whole groups, of which at most all are kept, got {counts}"
            )
        if self.top_k > self.top_groups * (self.experts // self.groups):
            raise ValueError(f"top_k must not exceed the experts to choose from, got {counts}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The facts of one model; frozen and hashable, so that it can be static under jit.

    After conversion nobody asks which family a model came from: behaviour follows these fields.
    """

    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    """Rows of the embedding and columns of the head (padding rows included)."""
    max_length: int
    """Longest canvas, in tokens, that the model was trained for."""
    rope_theta: float
    norm_eps: float
    mask_id: int
    """The id that stands for a token still to come; NO_ID where the model has none."""
    eos_id: int
    pad_id: int
    stop_ids: tuple[int, ...]
    """Ids that end a completion's text: eos, and the family's end-of-turn id."""
    dtype: str = "bfloat16"
    """Storage dtype of the weights."""
    weights: Literal["int8", "fp8"] | None = None
    """Linear maps of the layers are held in 8 bits with a scale per output channel (None: as all
    else, in dtype)."""
    family: str = "llada"
    """The conversion table that knows this model's Hugging Face form. Only exporting reads it."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values add a bias."""
    causal: bool = False
    """Whether a column attends to itself and to columns on its left only."""
    tied_head: bool = False
    """Whether the embedding serves as the head too."""
    shift_logits: bool = False
    """Whether row t of the logits predicts token t + 1. `model.py` returns them unshifted."""
    qk_norm: bool = False
    """Whether queries and keys are RMS-normed, per head and before rotary embedding."""
    rotary_dim: int | None = None
    """Leading channels of a head that rotary embedding turns (None: all of them)."""
    block_causal: int | None = None
    """Block length of the mask: position p sees the blocks up to its own (None: everything)."""
    moe: MoEConfig | None = None
    """Mixture-of-experts layers (None: every layer has an MLP of width `mlp`)."""

    def __post_init__(self):
        ids = {"eos_id": 0, "pad_id": 0, "stop_ids": 0, "mask_id": NO_ID if self.causal else 0}
        check_fields(self, least=ids)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        if not self.stop_ids:
            raise ValueError("stop_ids=() must hold an id at least, eos_id as a rule")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"query heads must be a multiple of key/value heads, got heads={self.heads} and "
                f"kv_heads={self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, got {self.head_dim}")
        rotary = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if rotary % 2 or not 0 < rotary <= self.head_dim:
            raise ValueError(f"rotary_dim={rotary} must be even, up to head_dim={self.head_dim}")

    def moe_layer(self, layer: int) -> MoEConfig | None:
        """The facts of the experts of a layer; None where it has an ordinary MLP."""
        return None if self.moe and layer in self.moe.dense_layers else self.moe

    @property
    def held(self) -> str:
        """How the weights are held, in words."""
        return f"{self.dtype}, linear maps in {self.weights}" if self.weights else self.dtype

    def to_json(self) -> str:
        """JSON text for config.json beside converted weights."""
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """The inverse of `to_json`; ValueError, naming a key or a field, where it cannot be."""
        found = json.loads(text)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ValueError(f"not a converted config: the key 'format' must be '{FORMAT}'")
        if found.get("moe") is not None:
            found["moe"] = read(MoEConfig, found["moe"], "moe of the converted config")
        return read(cls, found, "the converted config")


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint in our own format."""
    try:
        return json.loads((folder / "config.json").read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def count_parameters(config: ModelConfig) -> int:
    """Number of weights of the model that `config` describes."""
    attention = config.embed * config.head_dim * 2 * (config.heads + config.kv_heads)
    if config.qkv_bias:
        attention += config.head_dim * (config.heads + 2 * config.kv_heads)
    norms = 2 * config.embed + (2 * config.head_dim if config.qk_norm else 0)
    layers = config.layers * (attention + norms)
    for i in range(config.layers):
        moe, width = config.moe_layer(i), config.mlp
        if moe:
            width = moe.experts * moe.expert_mlp + moe.shared_mlp
            layers += moe.experts * (config.embed + (moe.expert_bias != "none"))
        layers += 3 * config.embed * width
    ends = (1 if config.tied_head else 2) * config.vocab * config.embed
    return layers + ends + config.embed


LLADA_8B = ModelConfig(
    layers=32,
    embed=4096,
    heads=32,
    kv_heads=32,
    head_dim=128,
    mlp=12288,
    vocab=126464,
    max_length=4096,
    rope_theta=500000.0,
    norm_eps=1e-5,
    mask_id=126336,
    eos_id=126081,
    pad_id=126081,
    stop_ids=(126081, 126348),
)

DREAM_7B = ModelConfig(
    layers=28,
    embed=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    mlp=18944,
    vocab=152064,
    max_length=131072,  # as the published config says; trained on 2048
    rope_theta=1e6,
    norm_eps=1e-6,
    mask_id=151666,
    eos_id=151643,
    pad_id=151643,
    stop_ids=(151643, 151645),
    family="dream",
    qkv_bias=True,
    shift_logits=True,
)

QWEN2_5_HALF_B = ModelConfig(
    layers=24,
    embed=896,
    heads=14,
    kv_heads=2,
    head_dim=64,
    mlp=4864,
    vocab=151936,
    max_length=32768,
    rope_theta=1e6,
    norm_eps=1e-6,
    mask_id=NO_ID,
    eos_id=151643,
    pad_id=151643,
    stop_ids=(151643, 151645),
    family="qwen2",
    qkv_bias=True,
    causal=True,
    tied_head=True,
)

# The shape of the model that ships inside the package; ids are those of its tokenizer.
BUNDLED = ModelConfig(
    layers=8,
    embed=256,
    heads=8,
    kv_heads=8,
    head_dim=32,
    mlp=896,
    vocab=576,
    max_length=512,
    rope_theta=10000.0,
    norm_eps=1e-5,
    mask_id=5,
    eos_id=1,
    pad_id=1,
    stop_ids=(1, 2),
)

LLADA2_EXPERTS = MoEConfig(
    experts=256,
    top_k=8,
    expert_mlp=512,
    shared_mlp=512,
    dense_layers=(0,),
    score="sigmoid",
    renormalise=True,
    scale=2.5,
    groups=8,
    top_groups=4,
    expert_bias="selection",
    router_stored="bfloat16",
)

LLADA2_MINI = ModelConfig(
    layers=20,
    embed=2048,
    heads=16,
    kv_heads=4,
    head_dim=128,
    mlp=5120,
    vocab=157184,
    max_length=32768,
    rope_theta=600000.0,
    norm_eps=1e-6,
    mask_id=156895,
    eos_id=156892,
    pad_id=156892,
    stop_ids=(156892,),
    family="llada2",
    qk_norm=True,
    rotary_dim=64,
    block_causal=32,
    moe=LLADA2_EXPERTS,
)

LLADA2_FLASH = dataclasses.replace(
    LLADA2_MINI,
    layers=32,
    embed=4096,
    heads=32,
    mlp=9216,
    max_length=16384,
    moe=dataclasses.replace(LLADA2_EXPERTS, expert_mlp=1024, shared_mlp=1024),
)

# As published, but for vocab and norm_eps, which have not been compared with it.
LLADA_MOE_7B = ModelConfig(
    layers=16,
    embed=2048,
    heads=16,
    kv_heads=16,
    head_dim=128,
    mlp=8192,
    vocab=157184,
    max_length=8192,
    rope_theta=50000.0,
    norm_eps=1e-5,
    mask_id=156895,
    eos_id=156892,
    pad_id=156892,
    stop_ids=(156892,),
    family="llada_moe",
    qk_norm=True,
    rotary_dim=128,
    moe=MoEConfig(experts=64, top_k=8, expert_mlp=1024),
)

# What `model=random:<name>` may be. "tiny" has no published counterpart; it is there so that
# every path that takes random weights can be tried on a laptop.
NAMED: dict[str, ModelConfig] = {
    "llada-8b": LLADA_8B,
    "llada-1.5": LLADA_8B,
    "llada-moe-7b": LLADA_MOE_7B,
    "llada2-mini": LLADA2_MINI,
    "llada2-flash": LLADA2_FLASH,
    "dream-7b": DREAM_7B,
    "diffucoder-7b": dataclasses.replace(DREAM_7B, stop_ids=(151667, *DREAM_7B.stop_ids)),
    "qwen2.5-0.5b": QWEN2_5_HALF_B,
    "bundled": BUNDLED,
    "tiny": dataclasses.replace(
        LLADA_8B, layers=2, embed=64, heads=4, kv_heads=2, head_dim=16, mlp=128, vocab=320,
        max_length=512, mask_id=316, eos_id=315, pad_id=315, stop_ids=(315, 314), dtype="float32",
    ),
}  # fmt: skip
