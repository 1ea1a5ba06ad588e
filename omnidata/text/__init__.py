"""Text: tokenizers that behave tomorrow as they do today, and what can be proven about a chat template.

tokenizer           load, fingerprint                  preparation.py makes one ready, convert.py reads others
encoder             text in which nobody can type a control token
chat_template       what a template prints around contents; opacity.py proves that it only prints
vocabulary          ids back to readable pieces, without transformers
"""
