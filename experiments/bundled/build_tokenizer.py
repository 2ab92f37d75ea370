"""Train the bundled model's tokenizer: byte-level BPE on the tasks' own texts.

    python experiments/bundled/build_tokenizer.py [output=jdllm/bundled] [vocab_size=1024]

Digits and the signs + - * / = ( ) , stay tokens of their own, so arithmetic is read digit by
digit. Merges may cross spaces, so a task's fixed instruction shrinks to a few tokens. Bytes are
the alphabet: every text has an encoding and round-trips.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from jdllm.tasks.puzzles import countdown, sudoku

OUTPUT = Path(__file__).resolve().parents[2] / "jdllm" / "bundled"
VOCAB_SIZE = 1024  # an upper limit: training stops once every text is merged as far as it goes
VOCAB_MULTIPLE = 64
DOCS = 2000
SEED = 0

# LLaDA's names and chat layout
BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
EOT, START_HEADER, END_HEADER = "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"
SPECIAL_TOKENS = [BOS, EOS, EOT, START_HEADER, END_HEADER, MASK]
ROLES = ["system", "user", "assistant"]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    f"{{{{ '{START_HEADER}' + message['role'] + '{END_HEADER}\\n\\n' }}}}"
    f"{{{{ message['content'] | trim + '{EOT}' }}}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{{{{ '{START_HEADER}assistant{END_HEADER}\\n\\n' }}}}"
    "{% endif %}"
)

# what may not merge with its neighbours; runs of newlines merge among themselves only
ALONE = r"[0-9]|[-+*/=(),]|\n+"


def texts() -> list[str]:
    """The training texts: prompts and responses of both tasks, and what surrounds them."""
    found = []
    for task in (sudoku, countdown):
        docs = task.generate(DOCS, SEED, held_out=False)
        found += [task.prompt(doc) for doc in docs]
        found += [task.response(doc) for doc in docs]
        if task is countdown:
            found += [countdown.response(doc, chain=False) for doc in docs]
    return found + [*ROLES, "\n\n"] * DOCS


def train(vocab_size: int) -> Tokenizer:
    """Train the BPE; its vocabulary holds at most vocab_size tokens, the special ones first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ALONE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "additional_special_tokens": [EOT, START_HEADER, END_HEADER],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def report(folder: Path) -> None:
    """Print the ids of the special tokens and how long prompts and responses are in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    print(f"{size} ids, {-(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE} padded")
    for token in SPECIAL_TOKENS:
        print(f"  {tokenizer.convert_tokens_to_ids(token):4d} {token}")
    for name, task in (("sudoku", sudoku), ("countdown", countdown)):
        docs = task.generate(1000, SEED, held_out=True)
        chats = [[{"role": "user", "content": task.prompt(doc)}] for doc in docs]
        prompts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for chat in chats
        ]
        responses = [tokenizer(task.response(doc) + EOT)["input_ids"] for doc in docs]
        for kind, rows in (("prompt", prompts), ("response", responses)):
            lengths = [len(row) for row in rows]
            print(f"{name} {kind}: {min(lengths)} to {max(lengths)} tokens")


def main(words: list[str]) -> None:
    """Train, save and report."""
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if len(options) != len(words) or set(options) - {"output", "vocab_size"}:
        raise SystemExit(
            "usage: python experiments/bundled/build_tokenizer.py [output=DIR] [vocab_size=N]"
        )
    folder = Path(options.get("output", OUTPUT))
    save(train(int(options.get("vocab_size", VOCAB_SIZE))), folder)
    print(f"wrote {folder}/tokenizer.json and tokenizer_config.json")
    report(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
