"""Packs from Megatron-Energon's loader, one process: examples/energon_loop.py DATA MODEL RUN.pt [--resume]"""

import sys
from itertools import islice

import torch
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
from transformers import AutoModelForImageTextToText

from omnidata.adapters.energon import PackTaskEncoder


def main(data, folder, file, *options, max_tokens=8192, packs=8, lr=1e-5, steps=1000, save_steps=100):
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").train()
    encoder = PackTaskEncoder(data, model, max_tokens=max_tokens)
    settings = {"packing_buffer_size": 1000, "batch_size": None, "shuffle_buffer_size": 1000}
    settings |= {"worker_config": WorkerConfig.default_worker_config(0), "max_samples_per_sequence": 100}
    loader = get_savable_loader(get_train_dataset(data, task_encoder=encoder, **settings))
    optimizer, start = torch.optim.SGD(model.parameters(), lr=lr), 0
    if "--resume" in options:
        kept = torch.load(file, weights_only=False)  # the state is an object of Energon's
        model.load_state_dict(kept["model"])
        loader.restore_state_rank(kept["loader"])
        start = kept["step"]
    stream = iter(loader)
    for step in range(start + 1, steps + 1):
        batch = list(islice(stream, packs))
        number = sum(pack.num_supervised for pack in batch)
        losses = [model(**pack.inputs | {"num_items_in_batch": number}).loss for pack in batch]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {float(sum(losses).detach()):.7f}: {[pack.keys for pack in batch]}")
        if step % save_steps == 0:
            torch.save({"model": model.state_dict(), "loader": loader.save_state_rank(), "step": step}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
