"""The numbers of quantization: formats, codes, scales, and how they are chosen. Arrays only.

Nothing here knows a network, a runtime or a file: a matrix (K, N) of float64 goes in, codes and float32 scales come
out (`Quantized`), and every error is measured against the scale as it is stored. So each method is tested by brute
force on small matrices, and passes only place what is computed here. `format` says what can be stored, `rounding`,
`clipping`, `gptq` and `saturation` choose codes, `low_rank` makes good for part of the error, and `observers` gathers
over calibration rows, in bounded memory and independently of how the rows are chunked, what the others need.
"""
