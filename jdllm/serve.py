"""Serves a model over HTTP, with OpenAI's interface and a page to chat on.

python -m jdllm.serve                                               # the bundled model, port 8000
python -m jdllm.serve model=GSAI-ML/LLaDA-8B-Instruct port=8000 engine.slots=16
python -m jdllm.serve executor=ray replicas=2 host=0.0.0.0 api_key=SECRET
"""

from jdllm.runtime import cli
from jdllm.server.config import ServeConfig, need_packages


def main(config: ServeConfig) -> None:
    """Serves until a signal asks to end; then what has begun is finished."""
    need_packages()
    if config.executor == "ray":
        from jdllm.server.spread import serve
    else:
        from jdllm.server.run import serve
    serve(config)


if __name__ == "__main__":
    cli.run(main, ServeConfig, "python -m jdllm.serve")
