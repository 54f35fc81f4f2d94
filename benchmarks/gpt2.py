"""`PEER-PYTHON benchmarks/gpt2.py BATCHES SHAPE`: forward and backward of transformers' GPT2LMHeadModel.

PEER-PYTHON is a virtual environment's with trainer.txt installed; nothing of ours is imported here. BATCHES is an .npz
of tokens and labels, int64 (N, B, L), labels -100 where nothing is supervised; SHAPE is GPT2Config's arguments as JSON.
Says "ready", its version and its parameters; then for each line it reads, runs all batches once and writes the
processor seconds that took.
"""

import json
import sys
import time

import numpy as np
import torch
import transformers


def main(batches: str, shape: str) -> None:
    torch.manual_seed(0)
    options = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0) | {"attn_implementation": "sdpa"}
    options |= dict.fromkeys(("bos_token_id", "eos_token_id"), None) | {"use_cache": False}
    config = transformers.GPT2Config(**json.loads(shape), **options)
    model = transformers.GPT2LMHeadModel(config).train()
    read = np.load(batches)
    pairs = list(zip(torch.from_numpy(read["tokens"]), torch.from_numpy(read["labels"])))
    print("ready", transformers.__version__, sum(p.numel() for p in model.parameters()), flush=True)
    for _ in sys.stdin:
        begun = time.process_time()
        for tokens, labels in pairs:
            model.zero_grad(set_to_none=True)
            model(input_ids=tokens, labels=labels).loss.backward()
        print(time.process_time() - begun, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
