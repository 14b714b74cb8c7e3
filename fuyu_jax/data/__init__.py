"""From records to packed rows: sources, layout, plan, rows, and the demo set.

A source gives examples, `lay_out` turns one into tokens and patch grids, `make_plan` decides on
lengths alone which examples share a row, and `PackedData` fills the rows when they are asked for.
"""
