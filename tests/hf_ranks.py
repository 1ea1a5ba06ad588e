"""What a rank of the multi-rank test of the Hugging Face adapter runs: DATA MODEL RUN STEPS."""

import json
import sys

import hosts
from transformers import Trainer, TrainingArguments

from omnidata.adapters import hf


def main(path, folder, run, steps):
    model = hosts.load_model(folder)
    data = hf.train_dataset(path, model, **{**hosts.SETTINGS, **hosts.FOUR_RANKS})
    arguments = {"optim": "sgd", "learning_rate": hosts.LR, "lr_scheduler_type": "constant"}
    arguments |= {"max_grad_norm": 0, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
    # A rank that does not call the tower ends with an error, and so do those that wait for it.
    arguments |= {"ddp_find_unused_parameters": False, "ddp_timeout": 120}
    args = TrainingArguments(run, **data.arguments(), **arguments, max_steps=int(steps), save_steps=3)
    trainer = Trainer(model, args, train_dataset=data, data_collator=data.collator, callbacks=[data.callback])
    trainer.train(resume_from_checkpoint=int(steps) > 3)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print("LOSSES", json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
