"""A checkpoint's tokenizer: `special_tokens.py` decides which tokens begin, end and pad a text, from the names that
`token_names.py` finds; `build.py` makes tokenizers of old vocabulary files, `added_tokens.py` adds tokens to a model.
"""
