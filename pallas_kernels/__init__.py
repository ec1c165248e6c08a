"""Kernels on paged keys and values: arrays in, arrays out, no knowledge of the engine.

A page pool is `[pages, kv_heads, page_size, head_dim]` for keys and the same for values. A page table row lists the
pages of one sequence in order; entries beyond its length may hold anything.
"""
