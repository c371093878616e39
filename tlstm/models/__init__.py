"""Recurrent models: a backbone and one file per head."""

from tlstm.models.backbone import BackboneOutput, LSTMModel
from tlstm.models.causal_lm import CausalLMOutput, LSTMForCausalLM

__all__ = ["BackboneOutput", "CausalLMOutput", "LSTMForCausalLM", "LSTMModel"]
