"""OmniLMM in torch, transformers and timm: a vision tower, a resampler and a Mistral language model.

config      the shape of a model
vision      a timm ViT: pixels -> patch features
resampler   patch features -> num_query image tokens
attention   packed documents stay apart
loss        cross-entropy on supervised positions only
modeling    all of it as one transformers model
processing  PIL images and arrays -> pixels for the model
parts       which part a parameter belongs to, and freezing
mixers      convolutions and recurrent mixers of other models, once per document
packed      any other vision-language model of transformers, trained on packs
isolation   does a model keep the documents of a pack apart?
tally       losses by group, while the loss is computed
blocks      activation checkpointing and torch.compile
weights     assemble, convert and list checkpoints (python -m omnimodel.weights)
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from omnimodel.config import OmniLMMConfig
from omnimodel.modeling import OmniLMMForCausalLM, OmniLMMModel
from omnimodel.processing import ImageProcessor
from omnimodel.resampler import Resampler

AutoConfig.register(OmniLMMConfig.model_type, OmniLMMConfig)
AutoModel.register(OmniLMMConfig, OmniLMMModel)
AutoModelForCausalLM.register(OmniLMMConfig, OmniLMMForCausalLM)

__all__ = ["ImageProcessor", "OmniLMMConfig", "OmniLMMForCausalLM", "OmniLMMModel", "Resampler"]
