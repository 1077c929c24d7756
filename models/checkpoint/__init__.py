"""Checkpoints in Hugging Face layout, read and written, and GGUF files, read.

In the order of reading: `hub.py` finds the folder and `info.py` reads config.json; `loading.py` makes the model, where
`tasks.py` decides with which head and `pooling.py` how an embedding pools; `weights.py` fills it with what `shards.py`
and `safetensors_io.py` read, by names that `renamed.py` may bring up to date. `saving.py` is the way back. Quantised
weights are found by `quantized.py`, and widened by `decoding.py`. A GGUF file is a checkpoint, too: `gguf.py` says what
config.json would, and under which names its tensors are published; `gguf_file.py` knows the format.
"""
