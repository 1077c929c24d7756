"""Checkpoints in Hugging Face layout, read and written, and GGUF files, read.

In the order of reading: `hub.py` finds the folder and `info.py` reads config.json; `loading.py` makes the model, where
`tasks.py` decides with which head and `pooling.py` how an embedding pools; `weights.py` fills it from the files that
`models/tensors/` reads, by names that `renamed.py` may bring up to date. `saving.py` is the way back. A GGUF file is a
checkpoint, too: `gguf.py` says what config.json would, and under which names its tensors are published.
"""
