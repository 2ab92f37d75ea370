"""What a server is started with."""

import dataclasses
from importlib.util import find_spec
from typing import Literal

from jdllm.arguments import ModelArgs, check_spread
from jdllm.decode import DecodeConfig
from jdllm.engine import EngineConfig


def need_packages() -> None:
    """ValueError where the packages that serve HTTP are not installed."""
    lost = [name for name in ("fastapi", "uvicorn", "prometheus_client") if not find_spec(name)]
    if lost:
        raise ValueError(f"serving needs {', '.join(lost)}: pip install 'jdllm[serve]'")


@dataclasses.dataclass(frozen=True)
class ServeConfig(ModelArgs):
    """An HTTP server for one model, with OpenAI's interface."""

    host: str = "127.0.0.1"
    """Where to listen; 0.0.0.0 is every network that this machine is in."""
    port: int = 8000
    """0 takes any that is free, and says which."""
    name: str = ""
    """The model's name to clients (default: what `model` is)."""
    api_key: str = ""
    """Clients must send it as a bearer token (default: the variable JDLLM_API_KEY; else anyone)."""
    decode: DecodeConfig = DecodeConfig()
    """How to decode; a request may change it."""
    engine: EngineConfig = EngineConfig()
    max_queue: int = 256
    """Completions that may wait; what comes then is refused with 429 and Retry-After."""
    max_body: int = 2_000_000
    """Bytes of a request at most."""
    max_n: int = 16
    """Completions of one prompt at most."""
    timeout: float = 600.0
    """Seconds that a request may take, its time in the queue included."""
    drain: float = 60.0
    """Seconds that requests have to finish after a signal to end."""
    warm: bool = True
    """Compile before the first request."""
    executor: Literal["local", "ray"] = "local"
    """ray: replicas are processes of a Ray cluster, behind one address (docs/cluster.md)."""
    replicas: int = 0
    """executor=ray: how many (default: as many as the cluster has room for)."""
    gpus: float | None = None
    """executor=ray: GPUs of a replica (default: one per device of its mesh, if there are any)."""

    def __post_init__(self):
        super().__post_init__()
        check_spread(self.executor, {"replicas": self.replicas}, self.gpus)
        for name in ("max_queue", "max_body", "max_n", "timeout", "drain"):
            if (number := getattr(self, name)) <= 0:
                raise ValueError(f"{name}={number} must be above 0")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port} must be below 65536")

    @property
    def title(self) -> str:
        """The model's name to clients."""
        return self.name or self.model
