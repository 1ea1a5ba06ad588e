"""Adapters: a dataset in other people's trainers, one small file each.

batch          Microbatch -> the keyword arguments that a model's forward takes
isolation      does a model keep packed documents apart? asked of the model itself
microbatches   the plan's microbatches by number, for hosts that sample by index
stream         the plan's microbatches one after the other, with a state
hf             Hugging Face Trainer, TRL's SFTTrainer
accelerate, pytorch, lightning, torchtitan, energon

Each imports its host, so that nothing here is loaded unless it is asked for. All of them keep the plan's
order, its packs and its loss denominators; what a host would do otherwise (shuffle, shard twice, average
means) is refused in one message that says what to set.
"""
