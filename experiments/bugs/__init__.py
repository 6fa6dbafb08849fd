"""What Torch-TensorRT and TensorRT got or get wrong for CLIP, each as a script that shows it.

    python -m experiments.bugs --out results/bugs.csv    # all, each in a process of its own
    python -m experiments.bugs.out_of_range_batch        # one of them

A script's docstring says what is wrong, how it is seen, and how this package avoids it.  It
compiles modules of a few lines with the stock `torch_tensorrt.dynamo.compile`, nothing of ours
registered, and ends with a verdict: `still wrong`, `mended in VERSION` (of Torch-TensorRT, where
its history says so) or `gone`.  docs/tensorrt_bugs.md is the table.
"""
