"""Chats in the terminal, with a model of its own or with a server; the canvas is shown live.

python -m jdllm.chat
python -m jdllm.chat url=http://127.0.0.1:8000
python -m jdllm.chat prompt="7 + 5 =" decode.block_length=8
"""

from jdllm.runtime import cli
from jdllm.server.terminal import ChatConfig, chat


def main(config: ChatConfig) -> None:
    """Reads messages and shows replies until the input ends."""
    chat(config)


if __name__ == "__main__":
    cli.run(main, ChatConfig, "python -m jdllm.chat")
