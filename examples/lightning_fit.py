"""The same with Lightning's Trainer: examples/lightning_fit.py DATA MODEL RUN [--resume]"""

import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForImageTextToText

from omnidata.adapters.lightning import PackModule

PACKS = {"max_tokens": 8192, "global_batch": 8, "num_epochs": 3}


class Module(lightning.LightningModule):
    def __init__(self, model, lr):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.lr)


def main(dataset, folder, run, *options, packs=PACKS, lr=1e-5, save_steps=100, **settings):
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").train()
    data = PackModule(dataset, model, **packs)
    saving = ModelCheckpoint(run, "last", every_n_train_steps=save_steps, enable_version_counter=False)
    settings = {"max_epochs": 1, "accumulate_grad_batches": data.microbatches_per_step(), **settings}
    trainer = lightning.Trainer(callbacks=[saving, *settings.pop("callbacks", [])], **settings)
    trainer.fit(Module(model, lr), data, ckpt_path=f"{run}/last.ckpt" if "--resume" in options else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
