"""Tensors in files: what stands there, without its contents, and how it is read into place.

`safetensors_io.py` reads and writes a file of tensors, `shards.py` finds the files of a checkpoint, `gguf_file.py`
knows those of llama.cpp. Quantised weights are found by `quantized.py`, and widened by `decoding.py` while they are
read.
"""
