"""A checkpoint's tokenizer.

`special_tokens.py` decides which tokens begin, end and pad a text, from the names that `token_names.py` reads.
`build.py` makes tokenizers from old vocabulary files, `gguf_vocabulary.py` from the metadata of a GGUF file, and
`added_tokens.py` adds tokens to a model.
"""
