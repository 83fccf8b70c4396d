"""Fuse a text search agent into a vision-language model without training.

Reads three checkpoints of one family (base language model, vision-language model, text search
agent), weighs every changed weight by what dropping it would cost, and writes a folder that
`AutoModelForImageTextToText.from_pretrained` loads.

The files in the order they run: `calibration` (second moments of linear inputs), `shards` and
`checkpoint` (safetensors in and out), `families` (tensor names), `plan` (what happens to every
tensor), `methods` (the mathematics, one pure function a method), `engine` (plan, validate, apply),
with `output`, `report` and `card` for what it leaves behind.
"""
