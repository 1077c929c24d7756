"""The low-rank operations: projections with adapters, one for all rows or one a row.

Read `linear.py` (the maths and what is saved), `products.py` (each product by torch or Triton) and `linear_triton.py`.
`factors.py` holds an adapter's matrices and `dora.py` its magnitudes. Where rows have adapters of their own,
`row_groups.py` says which, `per_row.py` tells the layers, and `batched.py` computes.
"""
