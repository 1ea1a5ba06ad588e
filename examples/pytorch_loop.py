"""The same in a plain loop, one process: examples/pytorch_loop.py DATA MODEL RUN.pt [--resume]"""

import sys

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoModelForImageTextToText

from omnidata.adapters.pytorch import PackDataset

PACKS = {"max_tokens": 8192, "global_batch": 8, "num_epochs": 3}


def main(dataset, folder, file, *options, packs=PACKS, lr=1e-5, save_steps=100):
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").train()
    data = PackDataset(dataset, model, **packs)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    states = {"model": model, "optimizer": optimizer}
    states["loader"] = loader = StatefulDataLoader(data, batch_size=None)  # a batch is a pack already
    if "--resume" in options:
        for name, kept in torch.load(file, weights_only=True).items():
            states[name].load_state_dict(kept)
    loss = 0.0
    for number, batch in enumerate(loader, 1):
        share = model(**batch).loss
        share.backward()
        loss += float(share.detach())
        if number % data.microbatches_per_step == 0:
            optimizer.step()
            optimizer.zero_grad()
            step = data.state_dict()["step"]  # steps yielded whole
            print(f"step {step} loss {loss:.7f}")
            loss = 0.0
            if step % save_steps == 0:
                torch.save({name: owner.state_dict() for name, owner in states.items()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
