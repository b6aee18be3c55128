"""What the methods share that prune single weights: one dense model under a 0/1 mask.

Read in this order: `prunable` (which weights a mask is over), `budget` (how many of them stay),
`schedule` (when the mask changes), `frames` (what travels), `device` (training under a mask),
`intake` and `rounds` (the server's side), `method`. Then what devices do for one or two of the
methods: `grow`, `candidates`, `importance`. The methods themselves are the modules beside this
package.

Zeros scattered over a tensor save neither time nor bytes in a plain ONNX file: what these methods
cost on a device is the dense model. What they would cost on a machine that skips zeros stands
beside it in a run's summary, as `sparse_macs` and `sparse_bytes`.
"""
