"""Text: tokenizers that behave tomorrow as they do today, and what can be proven about a chat template.

tokenizer           load, prepare, fingerprint         sentencepiece_bpe.py converts a ``.model``
encoder             text in which nobody can type a control token
chat_template       what a template prints around contents; opacity.py proves that it only prints
vocabulary          ids back to readable pieces, without transformers
"""
