"""Converts Hugging Face checkpoints into Orbax checkpoints that restore onto any mesh, and back.

python -m jdllm.convert llada source=GSAI-ML/LLaDA-1.5 output=models/llada-1.5
python -m jdllm.convert export source=models/mine output=models/mine-hf
python -m jdllm.convert merge source=bundled adapter=FOLDER output=models/merged
python -m jdllm.convert plan llada-8b mesh=1x2 batch=16 length=1024 memory=80
"""

from jdllm.convert.commands import main

if __name__ == "__main__":
    main()
