"""Fuse text models into a vision-language model without training.

Reads checkpoints that share a base (base language model, vision-language model, text search agent,
further donors), weighs every changed weight by what dropping it would cost, and writes a folder
that `AutoModelForImageTextToText.from_pretrained` loads.

The files in the order they run:

calibrate   `shell` (a model without its layers), `inputs` and `sums` (what is watched and summed),
            `calibration` (whole model), `streaming` with `spill` (layer by layer), `fisher`,
            `stats` (the files)
plan        `shards` and `checkpoint` (safetensors in and out), `families` (tensor names), `scope`,
            `vocabulary`, `compatibility`, `plan` with `planned` (what happens to every tensor)
merge       `methods` (sources and rules), `sampling` (thresholds in one pass) and `selection`
            (in two), `kernels` with the fused loops of `kernels_pair` and twins in numpy and torch,
            `dense` (methods on whole matrices), `tensor` (one tensor in memory), `reader` and
            `writer` (one tensor of files), `budget` (thresholds over many), `validate`, `engine`
            (plan, validate, apply) with `journal` and `output`
afterwards  `cost`, `report`, `card`, `verify`, `hub`
"""
