"""The low-rank operations: projections with adapters, one for all rows or one a row.

Read `linear.py` (the maths and what is saved), `products.py` (each product by torch or Triton), `linear_triton.py` and
`tiles_triton.py`; `arguments.py` holds what they are called with, `factors.py` an adapter's matrices, `dora.py` its
magnitudes. Where rows have adapters of their own, `row_groups.py` says which, `per_row.py` tells the layers, and
`batched.py` has the maths; its products are in `batched_torch.py` and `batched_triton.py`.
"""
