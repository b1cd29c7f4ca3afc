"""The program: an ONNX graph held by `onnx_ir`, and weights that stay expressions until they are saved.

`onnx_ir` is the graph; no other graph class is written here. A weight is an expression over tensors on disk
(`weights.py`), so that passes compose without rounding and saving streams one tensor at a time.
"""
