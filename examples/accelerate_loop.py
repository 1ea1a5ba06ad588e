"""The same in accelerate: accelerate launch examples/accelerate_loop.py DATA MODEL RUN [--resume]"""

import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText

from omnidata.adapters import accelerate as adapter

PACKS = {"max_tokens": 8192, "global_batch": 8, "num_epochs": 3}


def main(dataset, folder, run, *options, packs=PACKS, lr=1e-5, save_steps=100):
    accelerator = Accelerator()
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    batches = adapter.packs(dataset, accelerator, model, **packs)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
    if "--resume" in options:
        accelerator.load_state(run)
    loss = 0.0
    for batch in batches:
        with accelerator.accumulate(model):
            share = model(**batch).loss
            accelerator.backward(share)
            optimizer.step()
            optimizer.zero_grad()
        loss += float(accelerator.reduce(share.detach(), "mean")) / batches.microbatches_per_step
        if accelerator.sync_gradients:
            step = batches.state_dict()["step"]  # steps yielded whole
            accelerator.print(f"step {step} loss {loss:.7f}")
            loss = 0.0
            if step % save_steps == 0:
                accelerator.save_state(run)


if __name__ == "__main__":
    main(*sys.argv[1:])
