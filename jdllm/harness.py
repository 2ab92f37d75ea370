"""jdllm as an lm-eval model: importing this module registers it, running it is lm-eval's command.

import lm_eval, jdllm.harness
lm_eval.simple_evaluate(model="jdllm", model_args="model=bundled,mesh=1x1", tasks=["gsm8k"])

python -m jdllm.harness run --model jdllm --model_args model=bundled --tasks gsm8k
"""

from jdllm.evaluation.harness import JdllmLM
from jdllm.load import enable_compilation_cache
from jdllm.runtime.cli import one_sentence

__all__ = ["JdllmLM"]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    enable_compilation_cache()
    with one_sentence():
        cli_evaluate()
